"""Collects requests to stop the run: SIGTERM, Ctrl-C, and SIGUSR1, which Slurm sends before a time limit."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from dist_moe.worker.contract import LAUNCH_VARIABLE, STOP_SIGNALS
from dist_moe.worker.exit import Stopped
from dist_moe.worker.signals import capture_signals

ACKNOWLEDGED = b"Ctrl-C: the run finishes its step, saves a checkpoint and stops; Ctrl-C again ends it at once\n"


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """Collect the signals that request a stop in a list; the run decides when to stop. For the main thread.

    Of Ctrl-C the first is such a request, and the second raises KeyboardInterrupt. A worker that waits in a collective
    sees signals when the collective ends. If another worker has failed, that is when its connection closes; otherwise
    the launcher kills the worker. After `Stopped` they are ignored, since launchers send SIGTERM to the workers that
    end last.
    """
    with capture_signals(STOP_SIGNALS, ignore_after=(Stopped,)) as received, _interrupts(received):
        yield received


@contextlib.contextmanager
def _interrupts(received: list[signal.Signals]) -> Iterator[None]:
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.SIG_IGN:
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        if signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signal.SIGINT)
        if LAUNCH_VARIABLE not in os.environ and os.environ.get("RANK", "0") == "0":
            # Not by sys.stderr, which the handler may have interrupted.
            with contextlib.suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, ACKNOWLEDGED)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except Stopped:
        previous = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
