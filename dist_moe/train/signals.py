"""Hears that the run is asked to stop: SIGTERM, and SIGUSR1, which Slurm sends ahead of a time limit."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[str]]:
    """In the block, these signals end nothing, and their names are put into the list. For the main thread."""
    received: list[str] = []

    def hear(signum: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(signum).name)

    before = {signum: signal.signal(signum, hear) for signum in ASKING}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
