"""The checks around each step: hangs, diverging replicas, and steps that are skipped one after the other."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from dist_moe.data.stream import Rows
from dist_moe.engine.train_state import TrainState
from dist_moe.health.hang_detector import HangDetector
from dist_moe.health.nonfinite import NonFiniteMonitor
from dist_moe.health.replica_check import ReplicaError, check_replicas


class HealthChecks:
    """Checks a run before and after each step. Every rank holds one and calls it at the same steps.

    Args:
        state: The run's state.
        hang_detector: Receives the number of each step, for its report.
        steps_done: Optimizer steps before this process began.
        on_error: Called before an error is raised; completes the checkpoint in progress, which may be the one to
            resume from, and returns the newest complete one. A collective call.
    """

    def __init__(
        self,
        state: TrainState,
        hang_detector: HangDetector,
        steps_done: int,
        on_error: Callable[[], Path | None],
    ) -> None:
        self._state = state
        self._hang_detector = hang_detector
        self._steps_done = steps_done
        self._on_error = on_error
        self._nonfinite = NonFiniteMonitor(state.config.train.skip_limit)

    def before_step(self, step: int) -> None:
        """Note the step that begins."""
        self._nonfinite.before_step(self._state.engine.device)
        self._hang_detector.set_step(step)

    def after_step(self, step: int, taken: bool, scales: tuple[Tensor, Tensor], rows: Sequence[Rows]) -> None:
        """Check the state that a step has left. A collective call.

        Args:
            step: The step, from 1.
            taken: Whether it was taken.
            scales: Its `StepRecord.scales`.
            rows: This rank's micro-batches of it.

        Raises:
            ReplicaError: Ranks hold different replicas of one state.
            NonFiniteError: `train.skip_limit` steps in a row were skipped.
        """
        try:
            check_replicas(self._state, step, self._steps_done)
        except ReplicaError:
            self._on_error()
            raise
        if self._nonfinite.after_step(taken):
            newest = self._on_error()
            raise self._nonfinite.error(self._state, step, rows, scales, newest)
