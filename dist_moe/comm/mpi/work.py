"""What a torch.distributed backend written in Python needs: the handle of an operation, and contiguous tensors.

`Work.wait` polls, so that a time-out can end it; a blocking call of MPI has none.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A waiting rank polls without pause at first, then gives up its time slice, then sleeps.
POLLS_BEFORE_YIELD = 200
POLLS_BEFORE_SLEEP = 2000
SLEEP_S = 50e-6


class Work(dist.Work):
    """A collective in flight.

    It keeps the tensors alive whose memory MPI uses, and `in_flight` keeps this handle alive, until the operation is
    complete, also where the caller drops it.

    Args:
        description: For error messages.
        test: Returns whether the operation is complete; not called again after that.
        tensors: What has to stay alive meanwhile.
        timeout: Of the process group.
        outputs: What `result` returns.
        finish: Called once after completion; None for nothing to do.
        in_flight: The handles of the group that are not complete; this one is added.
        source: Returns the rank that a received message came from.
    """

    def __init__(
        self,
        description: str,
        test: Callable[[], bool],
        tensors: Any,
        timeout: timedelta,
        outputs: Sequence[Tensor],
        finish: Callable[[], None] | None,
        in_flight: "set[Work]",
        source: Callable[[], int],
    ) -> None:
        super().__init__()
        self._description, self._test, self._tensors, self._timeout = description, test, tensors, timeout
        self._outputs, self._finish, self._in_flight, self._source = list(outputs), finish, in_flight, source
        self._done = False
        in_flight.add(self)

    def is_completed(self) -> bool:
        if not self._done and self._test():
            if self._finish is not None:
                self._finish()
            self._done, self._tensors, self._finish = True, None, None
            self._in_flight.discard(self)
        return self._done

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> None:
        return None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when the operation is complete.

        Args:
            timeout: 0 for that of the process group.

        Raises:
            RuntimeError: The time-out is over.
        """
        if self.is_completed():
            return True
        timeout_s = (timeout or self._timeout).total_seconds()
        started_s = time.monotonic()
        for polls in itertools.count():
            if self.is_completed():
                return True
            if polls > POLLS_BEFORE_YIELD:
                time.sleep(0 if polls < POLLS_BEFORE_SLEEP else SLEEP_S)
                if time.monotonic() - started_s > timeout_s:
                    raise RuntimeError(
                        f"{self._description} timed out after {timeout_s:g} s: another rank did not take part"
                    )
        raise AssertionError

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return self._outputs

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Return a completed future: this call waits."""
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self.result())
        return future

    def _source_rank(self) -> int:
        self.wait()
        return self._source()

    source_rank = _source_rank


class ContiguousView:
    """A contiguous tensor to work on: `target` itself, or a copy that `copy_back` writes to it."""

    def __init__(self, target: Tensor) -> None:
        self._target = target.detach()
        self.tensor = self._target.contiguous()

    def copy_back(self) -> None:
        """Write a copy back to the target."""
        if self.tensor is not self._target:
            self._target.copy_(self.tensor)


def clone_if_overlapping(source: Tensor, target: Tensor) -> Tensor:
    """Return `source`, or a clone where its memory overlaps that of `target`: MPI forbids overlapping buffers."""
    source_start, target_start = source.data_ptr(), target.data_ptr()
    overlap = source_start < target_start + target.nbytes and target_start < source_start + source.nbytes
    return source.clone() if overlap else source


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Return the elements of all parts in one contiguous tensor; a single contiguous part as it is."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])


def scatter_into(flat: Tensor, targets: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that copies consecutive parts of `flat` into the targets."""

    def copy() -> None:
        for part, target in zip(flat.split([one.numel() for one in targets]), targets, strict=True):
            target.detach().copy_(part.view(target.shape))

    return copy


def run_all(steps: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """Return a function that calls all steps in order."""

    def run() -> None:
        for step in steps:
            step()

    return run
