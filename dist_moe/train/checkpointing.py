"""When a run saves checkpoints, and what it does when saving fails."""

import time
from collections.abc import Callable
from pathlib import Path

from dist_moe.checkpoint.async_saver import AsyncSaver, Saved
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import step_of
from dist_moe.checkpoint.resume import Checkpoint
from dist_moe.engine.train_state import TrainState
from dist_moe.train.reporting import Report


class CheckpointSchedule:
    """Saves the checkpoints of one run and reports each. Every rank holds one and calls it at the same steps.

    A checkpoint after a skipped step deletes no older one: if the run has diverged, it must resume from one of them.

    Args:
        state: The run's state.
        report: Logs each checkpoint, and each failure.
        resumed_from: The checkpoint that the run resumes from, if any.
        clock: Monotonic clock in seconds. Rank 0's decides for all, through the flags of a step.

    Attributes:
        newest: The folder of the newest complete checkpoint, at first that of `resumed_from`; None if there is none.
    """

    def __init__(
        self,
        state: TrainState,
        report: Report,
        resumed_from: Checkpoint | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = state.config
        self._clock = clock if state.engine.mesh.rank == 0 else None
        self._saved_s = clock()
        # Steps of the checkpoints that the next one replaces.
        self._temporary: tuple[int, ...] = ()
        self._saver = AsyncSaver(state, report.warn)
        self._report = report
        self.newest: Path | None = None if resumed_from is None else resumed_from.folder

    @property
    def shard_written(self) -> bool:
        """Whether this rank's files of the checkpoint in progress are written, or have failed."""
        return self._saver.written

    @property
    def due_by_time(self) -> bool:
        """Whether `checkpoint.interval_minutes` have passed since the last save began; on rank 0 only."""
        limit_s = 60.0 * self._config.checkpoint.interval_minutes
        return self._clock is not None and limit_s > 0 and self._clock() - self._saved_s >= limit_s

    def after_step(self, step: int, taken: bool, stop_requested: bool, due_by_time: bool = False) -> None:
        """Save what is due after `step`. A collective call.

        Args:
            step: The step, from 1.
            taken: Whether it was taken.
            stop_requested: Whether the run ends here on request.
            due_by_time: Whether a checkpoint is due by the time since the last one.

        Raises:
            CheckpointError: The last checkpoint of the run cannot be saved.
        """
        interval = self._config.checkpoint.interval
        if stop_requested or step == self._config.train.steps:
            self._save_now(step, taken)
        elif (interval and step % interval == 0) or due_by_time:
            self._save_due(step, taken)

    def _save_due(self, step: int, taken: bool) -> None:
        """Begin to save a checkpoint that others will follow. A failure is reported, and training continues."""
        asynchronous = self._config.checkpoint.asynchronous
        self.finalize()
        self._restart_clock()
        try:
            self._saver.start_save(step, keep_all=not taken, asynchronous=asynchronous, replaces=self._temporary)
        except CheckpointError as error:
            self._report.warn(f"{error}; training continues")
        if not asynchronous:
            self.finalize()

    def _save_now(self, step: int, taken: bool) -> None:
        """Save a checkpoint that no other follows, and wait for it.

        Raises:
            CheckpointError: It cannot be saved.
        """
        self.finalize()
        self._record(self._saver.save(step, keep_all=not taken, replaces=self._temporary), permanent=True)

    def save_before_error(self, step: int) -> None:
        """Save the last whole step before an error ends the run. A failure is reported."""
        self.finalize()
        if step == 0 or (self.newest is not None and step_of(self.newest) == step):
            return
        try:
            self._save_now(step, taken=False)
        except CheckpointError as error:
            self._report.warn(str(error))

    def finalize(self) -> Path | None:
        """Complete the checkpoint in progress, if any. A collective call.

        Returns:
            The folder of the newest complete checkpoint.
        """
        try:
            saved = self._saver.finalize()
        except CheckpointError as error:
            self._report.warn(f"{error}; training continues")
            return self.newest
        if saved is not None:
            interval = self._config.checkpoint.interval
            self._record(saved, permanent=bool(interval) and saved.step % interval == 0)
        return self.newest

    def _record(self, saved: Saved, permanent: bool) -> None:
        """Report a complete checkpoint, and remember whether the next one replaces it."""
        kept = () if saved.replaced else self._temporary
        self._temporary = kept if permanent else (*kept, saved.step)
        self._report.saved(saved)
        self.newest = saved.folder

    def _restart_clock(self) -> None:
        if self._clock is not None:
            self._saved_s = self._clock()

    def close(self) -> None:
        """Wait until this rank has deleted the checkpoints that are not kept, after the last collective of the run."""
        self._saver.close()
