"""Hosts as the launchers write them: a hostfile, and DeepSpeed's include and exclude."""

import re
from collections.abc import Mapping
from pathlib import Path

from dist_moe.config.sections.cluster import NAME
from dist_moe.launch.command import LaunchError

LINE = re.compile(r"(\S+?)(?:\s+slots\s*=\s*(\S+)|:(\S+))?(?:\s+max_slots\s*=\s*\d+)?")

# host -> the numbers of its devices
Slots = dict[str, list[int]]


def read_hostfile(path: str) -> Slots:
    """The hosts of a file, in its order: `host0 slots=2` (DeepSpeed, OpenMPI), `host0:2` (MPICH) or `host0` (one).

    LaunchError with the line for what is none of these, a host that comes twice, and a file without a host.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"cluster.hostfile={path} cannot be read ({error}); give the path of a hostfile") from None
    hosts: Slots = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        name, slots = _parse(content, f"{path}, line {number}: {content!r}")
        if name in hosts:
            raise LaunchError(f"{path}, line {number}: {name} comes twice; give each host one line with all its slots")
        hosts[name] = list(range(slots))
    if not hosts:
        raise LaunchError(f"{path} names no host; write lines like `host0 slots=2`")
    return hosts


def _parse(content: str, told: str) -> tuple[str, int]:
    found = LINE.fullmatch(content)
    if found is None or not NAME.fullmatch(found[1]):
        raise LaunchError(f"{told} is no line of a hostfile; write for example `host0 slots=2`")
    slots = found[2] or found[3] or "1"
    if not slots.isdecimal() or int(slots) < 1:
        raise LaunchError(f"{told} has {slots} slots; give 1 or more")
    return found[1], int(slots)


def filter_hosts(hosts: Mapping[str, list[int]], include: str | None, exclude: str | None) -> Slots:
    """The hosts and devices that are left, in the order of `hosts`.

    include, exclude: HOST[:DEVICE[,DEVICE...]][@HOST...], only one of the two. LaunchError for both, for what is not
    there, and where nothing is left.
    """
    if include and exclude:
        raise LaunchError(f"cluster.include={include} and cluster.exclude={exclude} contradict; set one of the two")
    if not include and not exclude:
        return {name: list(devices) for name, devices in hosts.items()}
    key, text = ("include", include) if include else ("exclude", exclude)
    named = _specification(f"cluster.{key}", str(text), hosts)
    if include:
        left = {name: named[name] for name in hosts if name in named}
    else:
        left = {name: [one for one in devices if one not in named.get(name, [])] for name, devices in hosts.items()}
    left = {name: devices for name, devices in left.items() if devices}
    if not left:
        raise LaunchError(f"cluster.{key}={text} leaves no worker; name less")
    return left


def _specification(key: str, text: str, hosts: Mapping[str, list[int]]) -> Slots:
    found: Slots = {}
    for part in text.split("@"):
        name, colon, devices = part.partition(":")
        if name not in hosts:
            raise LaunchError(f"{key}={text} names {name!r}, which is not among the hosts; use {', '.join(hosts)}")
        numbers = devices.split(",") if colon else [str(one) for one in hosts[name]]
        for number in numbers:
            if not number.isdecimal() or int(number) not in hosts[name]:
                last = len(hosts[name]) - 1
                raise LaunchError(f"{key}={text} names device {number!r} of {name}, which has 0 to {last}; name those")
        found[name] = sorted({*found.get(name, []), *map(int, numbers)})
    return found
