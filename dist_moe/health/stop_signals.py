"""Collects requests to stop the run: SIGTERM, and SIGUSR1, which Slurm sends before a time limit."""

import contextlib
import signal
from collections.abc import Iterator

from dist_moe.worker.contract import STOP_SIGNALS
from dist_moe.worker.exit import Stopped
from dist_moe.worker.signals import capture_signals


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """Collect the signals that request a stop in a list; the run decides when to stop. For the main thread.

    A worker that waits in a collective sees them when the collective ends. If another worker has failed, that is when
    its connection closes; otherwise the launcher kills the worker. After `Stopped` they are ignored, since launchers
    send SIGTERM to the workers that end last.
    """
    with capture_signals(STOP_SIGNALS, ignore_after=(Stopped,)) as received:
        yield received
