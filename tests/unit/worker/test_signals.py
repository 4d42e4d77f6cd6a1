"""Signals that are collected in a list."""

import signal

import pytest

from dist_moe.worker.signals import capture_signals


def test_capture_signals_collects_them_in_order_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with capture_signals([signal.SIGUSR1, signal.SIGTERM]) as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGTERM, signal.SIGUSR1]
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("error", "ignored"), [(KeyError, True), (ValueError, False)])
def test_capture_signals_ignores_them_after_the_given_exceptions_alone(error: type[Exception], ignored: bool) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(error), capture_signals([signal.SIGUSR1], ignore_after=(KeyError,)):
            raise error
        assert signal.getsignal(signal.SIGUSR1) == (signal.SIG_IGN if ignored else before)
    finally:
        signal.signal(signal.SIGUSR1, before)
