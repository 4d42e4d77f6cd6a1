"""Collects signals in a list instead of ending the process."""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def capture_signals(
    signums: Iterable[signal.Signals], ignore_after: tuple[type[BaseException], ...] = ()
) -> Iterator[list[signal.Signals]]:
    """Append each of the given signals that arrives in the block to a list; it has no other effect.

    Call it from the main thread, which alone runs signal handlers. A call that blocks in C code delays the handler
    until it returns.

    Args:
        signums: The signals to capture.
        ignore_after: After one of these exceptions the signals are ignored; otherwise their previous handlers are
            restored at the end of the block.
    """
    received: list[signal.Signals] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(signum))

    handlers: dict[signal.Signals, Any] = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield received
    except ignore_after:
        handlers = dict.fromkeys(handlers, signal.SIG_IGN)
        raise
    finally:
        for signum, previous in handlers.items():
            signal.signal(signum, previous)
