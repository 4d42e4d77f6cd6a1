"""The store by which the ranks of a job find each other, on the address of rank 0 alone.

torch's own store listens on every interface of rank 0's host, and accepts every connection.
"""

import logging
import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore

from dist_moe.worker.network import NetworkError, is_local_address, is_loopback

logger = logging.getLogger(__name__)

AGENT_STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set by torchrun: "True" where its own process holds the store of the workers."""
MIN_BACKLOG = 128


def open_store(rank: int, world_size: int, timeout_s: float) -> TCPStore | None:
    """Return the store of a job at MASTER_ADDR and MASTER_PORT, which rank 0 holds.

    It listens on the address that MASTER_ADDR names. None where torch has to open it: torchrun holds it, or no address
    of MASTER_ADDR is rank 0's own, as behind a translation of addresses.

    Args:
        rank: The rank of this process.
        world_size: Number of ranks.
        timeout_s: How long an operation of the store, and the start, wait for other ranks.

    Raises:
        NetworkError: Something else listens there.
    """
    if os.environ.get(AGENT_STORE_VARIABLE) == "True":
        return None
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    if rank != 0:
        return TCPStore(name, port, world_size, False, timeout)
    address = listening_address(name)
    if address is None:
        logger.warning("MASTER_ADDR=%s is no address of this host, so rank 0's store listens on all of them", name)
        return None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, port), family=family, backlog=max(MIN_BACKLOG, world_size))
    except OSError as error:
        raise NetworkError(
            f"rank 0 cannot listen at {address}, port {port} ({error.strerror}); end what uses the port, or start "
            "the job with another one (MASTER_PORT, cluster.port)"
        ) from error
    return TCPStore(name, port, world_size, True, timeout, master_listen_fd=server.detach())


def listening_address(name: str) -> str | None:
    """Return the address of this host that a name or address means for the other ranks; None where there is none.

    A name of this host often resolves to a loopback address here, and to another one on other hosts.
    """
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    addresses = [str(entry[4][0]) for entry in entries]
    if is_loopback(name):
        return addresses[0]
    return next((one for one in addresses if not is_loopback(one) and is_local_address(one)), None)
