"""Reads hostfiles, and selects hosts by the notation of DeepSpeed's `--include` and `--exclude`."""

import re
from collections.abc import Mapping
from pathlib import Path

from dist_moe.config.sections.cluster import NAME
from dist_moe.launch.command import LaunchError

LINE = re.compile(r"(\S+?)(?:\s+slots\s*=\s*(\S+)|:(\S+))?(?:\s+max_slots\s*=\s*\d+)?")

# Host -> the numbers of its devices.
Slots = dict[str, list[int]]


def read_hostfile(path: str) -> Slots:
    """Return the hosts of a file, in its order.

    Accepted lines are `host0 slots=2` (DeepSpeed, OpenMPI), `host0:2` (MPICH) and `host0` (one slot).

    Raises:
        LaunchError: The file cannot be read, a line is invalid, a host is listed twice, or there is no host.
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
            raise LaunchError(
                f"{path}, line {number}: {name} is listed twice; give each host one line with all its slots"
            )
        hosts[name] = list(range(slots))
    if not hosts:
        raise LaunchError(f"{path} lists no host; write lines like `host0 slots=2`")
    return hosts


def _parse(content: str, where: str) -> tuple[str, int]:
    match = LINE.fullmatch(content)
    if match is None or not NAME.fullmatch(match[1]):
        raise LaunchError(f"{where} is not a line of a hostfile; write for example `host0 slots=2`")
    slots = match[2] or match[3] or "1"
    if not slots.isdecimal() or int(slots) < 1:
        raise LaunchError(f"{where} has {slots} slots; set 1 or more")
    return match[1], int(slots)


def filter_hosts(hosts: Mapping[str, list[int]], include: str | None, exclude: str | None) -> Slots:
    """Return the selected hosts and devices, in the order of `hosts`.

    Args:
        hosts: Host -> the numbers of its devices.
        include: The hosts and devices to use, as HOST[:DEVICE[,DEVICE...]][@HOST...], or None for all.
        exclude: The hosts and devices to leave out, in the same notation, or None for none.

    Raises:
        LaunchError: Both are given, a host or device does not exist, or none is left.
    """
    if include and exclude:
        raise LaunchError(f"cluster.include={include} and cluster.exclude={exclude} contradict; set one of the two")
    if not include and not exclude:
        return {name: list(devices) for name, devices in hosts.items()}
    key, text = ("include", include) if include else ("exclude", exclude)
    named = _parse_selection(f"cluster.{key}", str(text), hosts)
    if include:
        selected = {name: named[name] for name in hosts if name in named}
    else:
        selected = {
            name: [device for device in devices if device not in named.get(name, [])] for name, devices in hosts.items()
        }
    selected = {name: devices for name, devices in selected.items() if devices}
    if not selected:
        raise LaunchError(f"cluster.{key}={text} leaves no worker; select more")
    return selected


def _parse_selection(key: str, text: str, hosts: Mapping[str, list[int]]) -> Slots:
    selected: Slots = {}
    for part in text.split("@"):
        name, colon, devices = part.partition(":")
        if name not in hosts:
            raise LaunchError(
                f"{key}={text} names {name!r}, which is not a host of the cluster; use {', '.join(hosts)}"
            )
        numbers = devices.split(",") if colon else [str(device) for device in hosts[name]]
        for number in numbers:
            if not number.isdecimal() or int(number) not in hosts[name]:
                last = len(hosts[name]) - 1
                raise LaunchError(f"{key}={text} names device {number!r} of {name}, which has 0 to {last}; use those")
        selected[name] = sorted({*selected.get(name, []), *map(int, numbers)})
    return selected
