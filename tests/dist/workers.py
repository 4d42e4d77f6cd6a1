"""Workers as real processes, with their ranks in the environment."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.dist.loaded import LoadedProcess


@contextmanager
def direct(argv: Sequence[str], ranks: int, log: Path) -> Iterator[list[LoadedProcess]]:
    """Start `argv` once for each rank, and kill the remaining processes at the end of the block.

    log: The file of their output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    workers = [LoadedProcess(argv, {**os.environ, **shared, **place}, log) for place in places]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
