"""Checks of what joins the machines: whether every rank reaches every other, and whether their clocks agree."""

import itertools
import os
import socket
import time
from collections.abc import Sequence
from contextlib import closing

import torch.distributed as dist

from dist_moe.comm.reduce import all_gather_objects
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.worker.network import source_address

MOST_TOLD = 4
"""A rank looks no further then, since the others wait: a place that does not answer takes an eighth of the limit."""
APART_S = 1.0
"""Clocks that are further apart put the errors of hosts, and the curves of runs, into the wrong order."""


def check_ports(subject: DoctorContext) -> Finding:
    """Every rank connects by TCP to a free port of every other, at the address by which it reaches the meeting place.

    NCCL and gloo choose such ports for their own connections; NCCL makes them at the first exchange alone.
    """
    mesh = subject.mesh
    if mesh.world_size == 1:
        return Finding("ports", Outcome.idle, "one worker needs none")
    with closing(socket.create_server((own_address(), 0), backlog=mesh.world_size)) as server:
        rank_infos: list[tuple[str, int]] = all_gather_objects(server.getsockname()[:2])
        others = (rank for rank in range(mesh.world_size) if rank != mesh.rank)
        tried = (
            f"rank {rank} at {where}" for rank in others if (where := refused(rank_infos[rank], subject.limit_s / 8))
        )
        closed = list(itertools.islice(tried, MOST_TOLD))
        dist.barrier()  # nobody closes a port that somebody has not tried yet
    if closed:
        remedy = (
            "open the hosts' ports to each other (those of net.ipv4.ip_local_port_range), or name the network that "
            "joins them: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        )
        return Finding("ports", Outcome.failed, f"rank {mesh.rank} does not reach {', '.join(closed)}", remedy)
    where = ", ".join(dict.fromkeys(address for address, _ in rank_infos))
    return Finding("ports", Outcome.passed, f"every rank reaches a free port of every other, at {where}")


def own_address() -> str:
    """The address by which the other hosts reach this one; a collective call."""
    known = all_gather_objects(source_address(os.environ["MASTER_ADDR"]))
    # The meeting place's own host may know itself by a name of the loopback.
    return source_address(next((one for one in known if not one.startswith("127.")), known[0]))


def refused(rank_info: tuple[str, int], limit_s: float) -> str:
    """The place and the reason, where it cannot be reached; "" where it can."""
    try:
        socket.create_connection(rank_info, timeout=limit_s).close()
    except OSError as error:
        return f"{rank_info[0]}:{rank_info[1]} ({error})"
    return ""


def check_clocks(subject: DoctorContext) -> Finding:
    """The clocks of all hosts, read as they leave one barrier."""
    if subject.mesh.world_size == 1:
        return Finding("clocks", Outcome.idle, "one worker has one")
    dist.barrier()
    return compare_clocks(all_gather_objects((socket.gethostname(), time.time())))


def compare_clocks(found: Sequence[tuple[str, float]]) -> Finding:
    """found: host and seconds since 1970 of each rank."""
    (first, least), (last, most) = (pick(found, key=lambda one: one[1]) for pick in (min, max))
    if most - least > APART_S:
        told = f"that of {last} is {most - least:.1f} s before that of {first}"
        return Finding("clocks", Outcome.warned, told, "set them by the network (chrony, systemd-timesyncd)")
    return Finding("clocks", Outcome.passed, f"within {most - least:.3f} s of each other")
