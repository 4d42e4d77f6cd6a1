"""Hears that the run is asked to stop: SIGTERM, and SIGUSR1, which Slurm sends ahead of a time limit."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dist_moe.worker.exit import Stopped

ASKING = (signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """In the block, these signals end nothing, and their names are put into the list. For the main thread.

    A worker that waits in a collective hears them when that ends; if another worker has failed, that is when its
    connection closes, and else when the launcher kills. After `Stopped` they stay without effect: launchers send
    SIGTERM to the workers that leave last.
    """
    received: list[str] = []

    def hear(signum: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(signum).name)

    before: dict[signal.Signals, Any] = {signum: signal.signal(signum, hear) for signum in ASKING}
    try:
        yield received
    except Stopped:
        before = dict.fromkeys(ASKING, signal.SIG_IGN)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
