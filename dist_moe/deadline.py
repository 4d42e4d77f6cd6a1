"""Calls what may have no end."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_within(work: Callable[[], Result], limit_s: float, failure: str) -> Result:
    """Return what a call returns, or raise what it raises.

    It runs in a thread, which continues after the limit, and does not prevent the process from exiting.

    Args:
        work: What to call.
        limit_s: How long to wait for it, in seconds.
        failure: What is reported after the limit, to be followed by it.

    Raises:
        TimeoutError: The call takes longer.
    """
    answers: queue.SimpleQueue[tuple[Result] | Exception] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((work(),))
        except Exception as error:  # of any type: it is raised in the caller's thread
            answers.put(error)

    threading.Thread(target=call, name="call-within", daemon=True).start()
    try:
        answer = answers.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError(f"{failure} within {limit_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer[0]
