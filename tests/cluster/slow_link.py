"""Makes the link of a host slow: latency by a relay of frames, bandwidth by the kernel's token bucket."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.hosts import NETWORK, Host, environment, ip

RELAY = Path(__file__).with_name("relay.py")
OFFLOADS = ("tx", "rx", "sg", "tso", "gso", "gro")
"""With them the relay would receive frames that are too long for the link, and without checksums."""

CONGESTION_CONTROL = ("congctl", "cubic")
"""The default of Linux; another setting of a machine would change the measurements."""


@contextlib.contextmanager
def slow_link(pair: list[Host], one_way_s: float, megabits_per_s: float) -> Iterator[None]:
    """Make the link between two hosts slow for the length of the block; afterwards they are disconnected.

    Args:
        pair: The two hosts.
        one_way_s: The latency of each direction, in seconds.
        megabits_per_s: The bandwidth of each direction.
    """
    first, last = pair
    bridge = last.bridge
    near, middle, far = f"b-{last.name}", f"r-{last.name}", f"h-{last.name}"
    ip("link", "add", middle, "type", "veth", "peer", "name", far, namespace=bridge)
    for name in (middle, far):
        ip("link", "set", name, "up", namespace=bridge)
    for name in (near, middle, far, f"b-{first.name}"):
        _without_offloads(["ip", "netns", "exec", bridge], name)
    for host in pair:
        _without_offloads(host.argv([], Path("/")), "eth0")
        bucket = ["tbf", "rate", f"{megabits_per_s}mbit", "burst", "64kb", "latency", "400ms"]
        _run(host.argv(["ip", "route", "replace", NETWORK + ".0/24", "dev", "eth0", *CONGESTION_CONTROL], Path("/")))
        _run(host.argv(["tc", "qdisc", "add", "dev", "eth0", "root", *bucket], Path("/")))
    ip("link", "set", near, "nomaster", namespace=bridge)
    ip("link", "set", far, "master", "hub", namespace=bridge)
    command = ["ip", "netns", "exec", bridge, sys.executable, "-S", str(RELAY), near, middle, str(one_way_s)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as relay:
        try:
            assert relay.stdout is not None and relay.stdout.readline() == "ready\n", "the relay does not start"
            yield
        finally:
            relay.kill()


def _without_offloads(there: list[str], interface: str) -> None:
    _run([*there, "ethtool", "-K", interface, *(word for name in OFFLOADS for word in (name, "off"))])


def _run(command: list[str]) -> None:
    subprocess.run(command, env=environment(), check=True, capture_output=True, text=True, timeout=30)
