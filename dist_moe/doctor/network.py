"""Checks of the network between the ranks: reachable ports and synchronized clocks."""

import itertools
import os
import socket
import time
from collections.abc import Sequence
from contextlib import closing

import torch.distributed as dist

from dist_moe.comm.objects import all_gather_objects
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.worker.network import source_address

MAX_REPORTED = 4
"""Unreachable ranks after which a rank stops trying: the others wait for it, and each try may take limit_s / 8."""
MAX_CLOCK_OFFSET_S = 1.0
"""With a larger offset, the errors of several hosts and the curves of several runs appear in the wrong order."""


def check_ports(context: DoctorContext) -> Finding:
    """Connect from every rank to a free TCP port of every other rank.

    NCCL and gloo choose such ports for their own connections, and NCCL opens them only at the first collective.
    """
    mesh = context.mesh
    if mesh.world_size == 1:
        return Finding("ports", Outcome.not_applicable, "one worker opens no connections")
    with closing(socket.create_server((reachable_address(), 0), backlog=mesh.world_size)) as server:
        addresses = all_gather_objects(server.getsockname()[:2], tuple[str, int])
        others = (rank for rank in range(mesh.world_size) if rank != mesh.rank)
        attempts = ((rank, connection_error(addresses[rank], context.limit_s / 8)) for rank in others)
        unreachable = list(
            itertools.islice((f"rank {rank} at {error}" for rank, error in attempts if error), MAX_REPORTED)
        )
        dist.barrier()  # keep the port open until every rank has tried it
    if unreachable:
        remedy = (
            "open the hosts' ports to each other (the range is net.ipv4.ip_local_port_range), or select the network "
            "that connects them with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
        return Finding("ports", Outcome.failed, f"rank {mesh.rank} cannot reach {', '.join(unreachable)}", remedy)
    hosts = ", ".join(dict.fromkeys(address for address, _ in addresses))
    return Finding("ports", Outcome.passed, f"every rank reaches a free port of every other rank, at {hosts}")


def reachable_address() -> str:
    """Return the address at which the other hosts reach this one. A collective call."""
    addresses = all_gather_objects(source_address(os.environ["MASTER_ADDR"]), str)
    # On the host of MASTER_ADDR itself, the route to that name may lead over the loopback interface.
    external = next((address for address in addresses if not address.startswith("127.")), addresses[0])
    return source_address(external)


def connection_error(address: tuple[str, int], timeout_s: float) -> str:
    """Return the address and the reason if it refuses a TCP connection, or "" if it accepts one."""
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except OSError as error:
        return f"{address[0]}:{address[1]} ({error})"
    return ""


def check_clocks(context: DoctorContext) -> Finding:
    """Compare the clocks of all hosts, read right after one barrier."""
    if context.mesh.world_size == 1:
        return Finding("clocks", Outcome.not_applicable, "one worker has one clock")
    dist.barrier()
    return compare_clocks(all_gather_objects((socket.gethostname(), time.time()), tuple[str, float]))


def compare_clocks(clocks: Sequence[tuple[str, float]]) -> Finding:
    """Compare clocks.

    Args:
        clocks: Host name and seconds since 1970 of each rank.
    """
    (slowest, first_s), (fastest, last_s) = (select(clocks, key=lambda clock: clock[1]) for select in (min, max))
    if last_s - first_s > MAX_CLOCK_OFFSET_S:
        text = f"the clock of {fastest} is {last_s - first_s:.1f} s ahead of that of {slowest}"
        return Finding("clocks", Outcome.warned, text, "synchronize them (chrony, systemd-timesyncd)")
    return Finding("clocks", Outcome.passed, f"within {last_s - first_s:.3f} s of each other")
