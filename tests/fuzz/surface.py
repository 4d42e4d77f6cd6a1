"""One surface: a function that reads input, the inputs to try, and the errors with which it may refuse one."""

import contextlib
import gc
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import hypothesis
import hypothesis.errors
import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

LIMIT_S = 10.0
"""Longest time for one input."""
MAX_GROWTH_BYTES = 200 << 20
"""Largest growth of the process over all inputs of a surface."""
HEADROOM_BYTES = 4 << 30
"""Address space that one input may take in addition to what the process has."""


class Surface(NamedTuple):
    """What is tried.

    Attributes:
        name: Its name on the command line.
        inputs: The inputs.
        read: Reads one input; the folder is empty at the first input, and stays.
        valid: Inputs that are accepted.
        refusals: The errors with which `read` may refuse an input; any other is a failure.
    """

    name: str
    inputs: SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    valid: Sequence[Any]
    refusals: tuple[type[Exception], ...]


class Result(NamedTuple):
    """The outcome of one surface.

    Attributes:
        name: The surface.
        inputs: Number of inputs that were tried.
        refused: How many of them were refused.
        seconds: Time that it took.
        growth_bytes: How much the process has grown.
        failure: The smallest input that failed, with its traceback; empty if none did.
    """

    name: str
    inputs: int
    refused: int
    seconds: float
    growth_bytes: int
    failure: str


class HangError(Exception):
    """An input took longer than `LIMIT_S`."""


def try_surface(surface: Surface, count: int, seed: int, folder: Path) -> Result:
    """Try the valid inputs, and `count` others. A traceback, a hang, and growth beyond the limit are failures."""
    tried = refused = 0
    failure = ""
    hung = False

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @hypothesis.seed(seed)
    @given(surface.inputs)
    def try_one(value: Any) -> None:
        nonlocal tried, refused, failure, hung
        if hung:
            return  # to look for a smaller input that hangs as well would take the limit for each
        tried += 1
        try:
            with _time_limit(), silence():
                surface.read(value, folder)
        except surface.refusals as refusal:
            refused += 1
            if not str(refusal).strip():
                failure = f"input {value!r:.2000}\na refusal without a message"
                raise AssertionError(failure) from None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            hung = isinstance(error, HangError)
            failure = f"input {value!r:.2000}\n{traceback.format_exc()}"
            # Rust's PanicException is no Exception, and hypothesis would take it for an interrupt.
            raise AssertionError(failure) from None

    with silence():
        for value in surface.valid:
            surface.read(value, folder)  # what is loaded or made once is not of an input
    process = psutil.Process()
    started_s, before = time.monotonic(), process.memory_info().rss
    # What hypothesis raises depends on whether the failure occurs again; the last one is that of the smallest input.
    with (
        _address_space_limit(process),
        contextlib.suppress(AssertionError, hypothesis.errors.HypothesisException, ExceptionGroup),
    ):
        try_one()
    gc.collect()
    growth = process.memory_info().rss - before
    if growth > MAX_GROWTH_BYTES and not failure:
        failure = f"the process has grown by {growth >> 20} MiB over {tried} inputs"
    return Result(surface.name, tried, refused, time.monotonic() - started_s, growth, failure)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what is printed."""
    with contextlib.ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(nothing))
        stack.enter_context(contextlib.redirect_stderr(nothing))
        yield


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def end(signum: int, frame: FrameType | None) -> None:
        raise HangError(f"longer than {LIMIT_S:.0f} s")

    previous = signal.signal(signal.SIGALRM, end)
    # An interval: a broad `except` in what is tried may swallow the first one.
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _address_space_limit(process: psutil.Process) -> Iterator[None]:
    """Let an input that would fill the memory fail with MemoryError."""
    previous = resource.getrlimit(resource.RLIMIT_AS)
    limit = process.memory_info().vms + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, previous)
