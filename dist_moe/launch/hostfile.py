"""Reads hostfiles and the node files of batch systems, and selects hosts by the notation of DeepSpeed's `--include`."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dist_moe.config.sections.cluster import NAME, ipv6_of
from dist_moe.errors import reason_of
from dist_moe.launch.command import LaunchError
from dist_moe.text import up_to
from dist_moe.untrusted import read_text

LARGEST_HOSTFILE = 1 << 22
# A host, then nothing, `slots=2`, `:2` or ` 2`, and OpenMPI's largest number of slots, which changes nothing here.
LINE = re.compile(
    r"(\[[^\]\s]*\]|[^\s\[]+?)(?:\s+slots\s*=\s*(\S+)|:([^\s:]+)|\s+(\d+))?(?:\s+max[_-]slots\s*=\s*\d+)?"
)
LINE_END = re.compile(r"\r\n|\r|\n")
EXAMPLE = "write for example `host0 slots=2`"
# Longer lines are slow to match, and a list of more slots is large.
MAX_LINE_CHARACTERS, MAX_SLOTS = 1000, 4096

# Host -> the numbers of its devices.
Slots = dict[str, list[int]]


def read_hostfile(path: str, key: str = "cluster.hostfile") -> Slots:
    """Return the hosts of a file, in its order.

    Accepted lines are `host0 slots=2` (DeepSpeed, OpenMPI), `host0:2` (MPICH), `host0 2`, and `host0` for one slot,
    repeated for each further one (PBS, LSF). A host is a name or an address; an IPv6 address may be in brackets, and
    has to be before `:2`.

    Args:
        path: The path of the file.
        key: What names the file, for messages.

    Raises:
        LaunchError: The file cannot be read, a line is invalid, a host with slots is listed twice, or there is no host.
    """
    try:
        text = read_text(Path(path), follow=True, largest=LARGEST_HOSTFILE).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise LaunchError(f"{key}={path} cannot be read ({reason_of(error)}); give the path of a hostfile") from None
    lines = enumerate(LINE_END.split(text), start=1)
    return _slots_of_lines([(f"{path}, line {number}", line) for number, line in lines], path)


def _slots_of_lines(lines: Iterable[tuple[str, str]], where: str) -> Slots:
    counts: dict[str, int] = {}
    with_slots = set()
    for place, line in lines:
        content = line.partition("#")[0].strip()
        if not content:
            continue
        name, slots = _parse(content, f"{place}: {content!r}")
        if name in counts and (slots is not None or name in with_slots):
            raise LaunchError(f"{place}: {name} is listed twice; give each host one line with all its slots")
        if slots is not None:
            with_slots.add(name)
        counts[name] = counts.get(name, 0) + (slots or 1)
    if not counts:
        raise LaunchError(f"{where} lists no host; write lines like `host0 slots=2`")
    return {name: list(range(slots)) for name, slots in counts.items()}


def _parse(content: str, where: str) -> tuple[str, int | None]:
    """Return host and slots of a line; None where it has no number of slots."""
    if len(content) > MAX_LINE_CHARACTERS:
        raise LaunchError(f"{where[:MAX_LINE_CHARACTERS]}... has more than {MAX_LINE_CHARACTERS} characters; {EXAMPLE}")
    user, at, rest = content.partition("@")
    if at and NAME.fullmatch(user):
        raise LaunchError(
            f"{where} names the user {user}, and a hostfile lists hosts alone; write `{rest}`, and set "
            f"cluster.ssh_user={user} (for different users of different hosts, name them in ~/.ssh/config)"
        )
    bare = content.split()[0]
    if ipv6_of(bare) and not bare.startswith("["):
        # fd00::1:2 is an address, and not two slots of fd00::1.
        match = LINE.fullmatch(content.replace(bare, f"[{bare}]", 1))
    else:
        match = LINE.fullmatch(content)
    name = match and (ipv6_of(match[1]) or match[1])
    if match is None or not name or not (ipv6_of(name) or NAME.fullmatch(name)) or (":" in name and not ipv6_of(name)):
        raise LaunchError(f"{where} is not a line of a hostfile; {EXAMPLE}")
    slots = match[2] or match[3] or match[4]
    if slots is None:
        return name, None
    if not (slots.isascii() and slots.isdecimal()) or not 1 <= int(slots) <= MAX_SLOTS:
        raise LaunchError(f"{where} has {slots} slots; set 1 to {MAX_SLOTS}")
    return name, int(slots)


def allocated_hosts(environment: Mapping[str, str]) -> tuple[str, Slots]:
    """Return the hosts that PBS or LSF gave the job in which this process runs, and the variable that names them.

    PBS writes a line for each slot into the file of PBS_NODEFILE, and LSF into that of LSB_DJOB_HOSTFILE. The value of
    LSB_MCPU_HOSTS has the same as `host0 2 host1 2`. Outside of such a job there are none.

    Raises:
        LaunchError: The node file cannot be read, or a line is invalid.
    """
    for name, job in (("PBS_NODEFILE", "PBS_JOBID"), ("LSB_DJOB_HOSTFILE", "LSB_JOBID")):
        if environment.get(name) and environment.get(job):
            return name, read_hostfile(environment[name], name)
    words = environment.get("LSB_MCPU_HOSTS", "").split() if environment.get("LSB_JOBID") else []
    if words:
        where = f"LSB_MCPU_HOSTS={environment['LSB_MCPU_HOSTS']}"
        pairs = [" ".join(words[first : first + 2]) for first in range(0, len(words), 2)]
        return "LSB_MCPU_HOSTS", _slots_of_lines([(where, pair) for pair in pairs], where)
    return "", {}


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
        name, colon, devices = (part, "", "") if part in hosts else part.rpartition(":")
        name = name if colon or part in hosts else part
        if ipv6 := ipv6_of(name):
            name = ipv6
        if name not in hosts:
            raise LaunchError(
                f"{key}={text} names {name!r}, which is not a host of the cluster; use {', '.join(hosts)}"
            )
        numbers = devices.split(",") if colon else [str(device) for device in hosts[name]]
        for number in numbers:
            if not number.isdecimal() or int(number) not in hosts[name]:
                last = len(hosts[name]) - 1
                use = "those" if last else "that"
                raise LaunchError(
                    f"{key}={text} names device {number!r} of {name}, which has {up_to(last, first=0)}; use {use}"
                )
        selected[name] = sorted({*selected.get(name, []), *map(int, numbers)})
    return selected
