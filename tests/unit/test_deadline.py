"""A call with a limit: its result, its error, and the end of the wait."""

import time

import pytest

from dist_moe.deadline import call_within


def fail() -> None:
    """Raise the error that a socket raises after its own limit."""
    raise TimeoutError("timed out")


def test_a_call_returns_or_raises_what_it_does() -> None:
    assert call_within(lambda: None, 5, "it did not end") is None
    assert call_within(lambda: 3, 5, "it did not end") == 3
    with pytest.raises(TimeoutError, match=r"^timed out$"):
        call_within(fail, 5, "it did not end")


def test_a_call_that_takes_longer_is_left() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^it did not end within 0\.2 s$"):
        call_within(lambda: time.sleep(30), 0.2, "it did not end")
    assert time.monotonic() - began < 10
