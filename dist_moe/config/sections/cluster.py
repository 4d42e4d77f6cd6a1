"""The fields of the hosts, and of how to reach them."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from dist_moe.section import OneOrMore, Section, UserPath

# Safe in the command lines of ssh, pdsh and a shell: it cannot be an option, and needs no quotes.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# With the scope of a link-local address, as in fe80::1%eth0.
IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9_.-]+)?")


def ipv6_of(text: str) -> str | None:
    """Return an IPv6 address without the brackets that it may have, or None for anything else."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not IPV6.fullmatch(inner):
        return None
    try:
        return inner if ipaddress.IPv6Address(inner) else None
    except ValueError:
        return None


def _plain_name(text: str) -> str:
    if address := ipv6_of(text):
        return address
    if not NAME.fullmatch(text):
        raise ValueError("is not a valid name of a host, user or interface (letters, digits and _ . : -)")
    return text


def _variable(text: str) -> str:
    if not VARIABLE.fullmatch(text):
        raise ValueError("is not the name of an environment variable (letters, digits and _, not a digit first)")
    return text


Name = Annotated[str, AfterValidator(_plain_name)]
Variable = Annotated[str, AfterValidator(_variable)]


class HostConfig(Section):
    """One host."""

    name: Name = Field(description="the name or address of the host for ssh")
    slots: int = Field(default=1, ge=1, description="the workers on this host, one per device (1 or more)")
    address: Name | None = Field(
        default=None, description="the address of this host for the other workers, or null (that of its name)"
    )


class ClusterConfig(Section):
    """The hosts, and how to reach them. With none, the run uses this host alone."""

    hosts: list[HostConfig] = Field(
        default_factory=list,
        description="the hosts, each with `name: host0`, `slots: 2` and, where its name has another address for ssh, "
        "`address: 10.0.0.1`; rank 0 runs on the first",
    )
    hostfile: UserPath | None = Field(
        default=None,
        description="the path of a hostfile in place of hosts, with lines like `host0 slots=2`, or null",
    )
    include: str | None = Field(
        default=None,
        min_length=1,
        description="the hosts and devices to use, in the format of DeepSpeed (host0@host1:0,2), or null (all)",
    )
    exclude: str | None = Field(
        default=None, min_length=1, description="the hosts or devices to exclude, in the same format, or null (none)"
    )
    interface: Name | None = Field(
        default=None,
        description="the network interface for collectives, with the same name on each host, or null (the one with the "
        "route to rank 0)",
    )
    port: int = Field(
        default=29500, ge=1024, le=65535, description="the port of the rendezvous, on the first host (1024 to 65535)"
    )
    ssh_user: Name | None = Field(default=None, description="the user name for ssh, or null (the default of ssh)")
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None, description="the port of the ssh servers, or null (the default of ssh)"
    )
    environment: Annotated[list[Variable], OneOrMore] = Field(
        default_factory=list,
        description="the names of environment variables to forward to the workers; one of them needs no list",
    )
    folder: UserPath | None = Field(
        default=None,
        description="the working folder on each host, for relative paths, or null (that of the launcher)",
    )
    python: UserPath | None = Field(
        default=None, description="the path of Python on each host, or null (that of the launcher)"
    )
    shared_storage: bool = Field(default=True, description="whether run.dir is on storage that all hosts share")
