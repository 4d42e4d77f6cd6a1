"""Addresses, interfaces and ports of this host. Imports no torch."""

import contextlib
import ipaddress
import random
import socket
from pathlib import Path

import psutil

from dist_moe.errors import UserError

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""These set the network interface on which gloo and NCCL listen and connect."""
EPHEMERAL_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT = 10_000
FIRST_EPHEMERAL_PORT = 32_768
"""Where Linux begins its range for outgoing connections, unless the file says otherwise."""
MIN_PORTS = 2_000
TRIES = 100
# Connecting a UDP socket sends nothing: the kernel only looks up the route. Any port will do.
DISCARD_PORT = 9


class NetworkError(UserError, RuntimeError):
    """The network of this host cannot do what is needed (value, rule and remedy in the message)."""


def source_address(target: str) -> str:
    """Return the address of this host that its routing table uses for packets to `target`.

    Args:
        target: An IPv4 or IPv6 address, or a name that resolves to an IPv4 address.

    Raises:
        OSError: The name does not resolve, or no route leads to it.
    """
    with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, DISCARD_PORT))
        return str(probe.getsockname()[0])


def is_local_address(address: str) -> bool:
    """Return whether this host has the IP address: a host sends to its own address from that address."""
    with contextlib.suppress(OSError):
        return source_address(address) == address
    return False


def is_loopback(address: str) -> bool:
    """Return whether an address, or the name localhost, reaches this host alone."""
    if address == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has the IP address on this host, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name.partition(":")[0]  # without the label of a secondary address, as in eth0:1
    return None


def free_port() -> int:
    """Return a TCP port that is free on every interface of this host.

    The port is below the kernel's range for outgoing connections. Binding to port 0 would return one inside that
    range, which an outgoing connection may take in the seconds until the workers listen on it.

    Raises:
        NetworkError: 100 random ports were all in use.
    """
    first_ephemeral = FIRST_EPHEMERAL_PORT
    if EPHEMERAL_RANGE_FILE.exists():
        first_ephemeral = int(EPHEMERAL_RANGE_FILE.read_text().split()[0])
    end = first_ephemeral if first_ephemeral > FIRST_PORT + MIN_PORTS else 1 << 16
    for port in random.SystemRandom().sample(range(FIRST_PORT, end), k=TRIES):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise NetworkError(f"none of {TRIES} ports tried from {FIRST_PORT} to {end} is free; end other jobs on this host")
