"""Transient errors of shared storage are tried again, and others are not."""

import errno

import pytest

from dist_moe.worker.shared_storage import try_again


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_a_transient_error_is_tried_again(number: int) -> None:
    errors = [OSError(number, "for a moment")] * 2

    def operation() -> int:
        if errors:
            raise errors.pop()
        return 7

    assert try_again(operation) == 7 and not errors


@pytest.mark.parametrize(("number", "limit_s"), [(errno.ENOENT, 5.0), (errno.ENOSPC, 5.0), (errno.ESTALE, 0.2)])
def test_other_errors_and_those_that_last_are_raised(number: int, limit_s: float) -> None:
    def operation() -> None:
        raise OSError(number, "for ever")

    with pytest.raises(OSError, match="for ever"):
        try_again(operation, limit_s)
