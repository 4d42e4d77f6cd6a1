"""What a backend of torch.distributed in Python needs: the handle of an operation, and tensors in one piece.

Whoever waits asks again and again, so that a time-out can end the wait.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TESTS_BEFORE_YIELD = 200
TESTS_BEFORE_SLEEP = 2000
SLEEP_S = 50e-6


class Work(dist.Work):
    """A collective on its way.

    It holds the tensors whose memory is worked on, and `started` holds it, until the data is there, also where the
    caller lets go of it.

    what: for messages. test: whether the data is there; it is asked until it says so, and then no more. finish: what
    remains to be done then. source: the rank that a received message came from.
    """

    def __init__(
        self,
        what: str,
        test: Callable[[], bool],
        held: Any,
        timeout: timedelta,
        outputs: Sequence[Tensor],
        finish: Callable[[], None] | None,
        started: "set[Work]",
        source: Callable[[], int],
    ) -> None:
        super().__init__()
        self._what, self._test, self._held, self._timeout = what, test, held, timeout
        self._outputs, self._finish, self._started, self._source = list(outputs), finish, started, source
        self._done = False
        started.add(self)

    def is_completed(self) -> bool:
        if not self._done and self._test():
            if self._finish is not None:
                self._finish()
            self._done, self._held, self._finish = True, None, None
            self._started.discard(self)
        return self._done

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> None:
        return None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when the data is there. RuntimeError after `timeout`, or that of the group where it is 0."""
        if self.is_completed():
            return True
        limit_s = (timeout or self._timeout).total_seconds()
        begun_s = time.monotonic()
        for test in itertools.count():
            if self.is_completed():
                return True
            if test > TESTS_BEFORE_YIELD:
                time.sleep(0 if test < TESTS_BEFORE_SLEEP else SLEEP_S)
                if time.monotonic() - begun_s > limit_s:
                    raise RuntimeError(f"{self._what} timed out after {limit_s:g} s: another rank did not take part")
        raise AssertionError

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return self._outputs

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future that is done: this call waits."""
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self.result())
        return future

    def _source_rank(self) -> int:
        self.wait()
        return self._source()

    source_rank = _source_rank


class ContiguousView:
    """A tensor without gaps to work on: `target` itself, or a copy that `put_back` writes to it."""

    def __init__(self, target: Tensor) -> None:
        self._target = target.detach()
        self.tensor = self._target.contiguous()

    def put_back(self) -> None:
        if self.tensor is not self._target:
            self._target.copy_(self.tensor)


def clone_if_overlapping(given: Tensor, taken: Tensor) -> Tensor:
    """`given`, or a copy where it overlaps `taken`: MPI may not write what it reads."""
    begin, target = given.data_ptr(), taken.data_ptr()
    overlap = begin < target + taken.nbytes and target < begin + given.nbytes
    return given.clone() if overlap else given


def concat(parts: Sequence[Tensor]) -> Tensor:
    """The elements of all parts in one piece; of a single one its own memory, where it has no gaps."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])


def scatter_into(flat: Tensor, targets: Sequence[Tensor]) -> Callable[[], None]:
    """What copies consecutive parts of `flat` into the targets."""

    def copy() -> None:
        for part, target in zip(flat.split([one.numel() for one in targets]), targets, strict=True):
            target.detach().copy_(part.view(target.shape))

    return copy


def run_all(steps: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run
