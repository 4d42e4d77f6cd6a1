"""The hosts that a run is spread over, as written in its file."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from dist_moe.section import Section

# A name that ssh, pdsh and a shell all take for a name: it begins no option and ends no word.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")


def _plain_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a host, user or interface; use letters, digits and _ . : -")
    return text


Name = Annotated[str, AfterValidator(_plain_name)]


class HostConfig(Section):
    """One machine."""

    name: Name = Field(description="the name or address that ssh reaches the host by")
    slots: int = Field(default=1, ge=1, description="the workers of this host, one for each device (1 or more)")
    address: Name | None = Field(
        default=None, description="the address that the other workers reach this host by, or null (what its name means)"
    )


class ClusterConfig(Section):
    """The hosts, and how to reach them. Without any the run stays on this host."""

    hosts: list[HostConfig] = Field(
        default_factory=list,
        description="the hosts, each `name: host0`, `slots: 2` and, if its name means another, `address: 10.0.0.1`; "
        "rank 0 is on the first",
    )
    hostfile: str | None = Field(
        default=None, min_length=1, description="the file of hosts instead, lines like `host0 slots=2`, or null"
    )
    include: str | None = Field(
        default=None,
        min_length=1,
        description="the hosts to use, and their devices, as DeepSpeed writes them (host0@host1:0,2), or null (all)",
    )
    exclude: str | None = Field(
        default=None, min_length=1, description="the hosts or devices to leave out, written likewise, or null (none)"
    )
    interface: Name | None = Field(
        default=None,
        description="the network interface of the collectives, the same on each host, or null (the one that leads to "
        "rank 0)",
    )
    port: int = Field(
        default=29500, ge=1024, le=65535, description="the port where the workers meet, on the first host"
    )
    ssh_user: Name | None = Field(default=None, description="the user to log in as, or null (ssh's own choice)")
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None, description="the port of the ssh servers, or null (ssh's own choice)"
    )
    environment: list[Name] = Field(
        default_factory=list,
        description="the names of environment variables that go along to the workers (no others do)",
    )
    folder: str | None = Field(
        default=None,
        min_length=1,
        description="the working folder on each host, where relative paths begin, or null (that of the launch)",
    )
    python: str | None = Field(
        default=None, min_length=1, description="the path of Python on each host, or null (that of the launch)"
    )
    shared_storage: bool = Field(default=True, description="whether all hosts see the same run.dir")
