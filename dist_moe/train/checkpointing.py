"""When a run saves, what it does if that fails, and what is told of it."""

from pathlib import Path

from dist_moe.checkpoint.async_saver import AsyncSaver
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import step_of
from dist_moe.train.reporting import Report


class CheckpointSchedule:
    """The saver of one run, and the report that is told of each checkpoint. Every rank has one and calls it alike.

    newest: the folder of the newest complete checkpoint; the one that the run goes on from, until there is another.
    A step that was skipped is saved as any other, but no older checkpoint is deleted then: the run may be lost.
    """

    def __init__(self, saver: AsyncSaver, report: Report, newest: Path | None) -> None:
        self._saver = saver
        self._report = report
        self.newest = newest

    @property
    def written(self) -> bool:
        """Whether this rank has written its files of a checkpoint that is not complete yet."""
        return self._saver.written

    def save_due(self, step: int, taken: bool, asynchronous: bool) -> None:
        """Save a checkpoint that others will follow: one that fails is told, and costs no step of training.

        beside: whether training goes on while it is written.
        """
        self.finalize()
        try:
            self._saver.save_async(step, keep_all=not taken, asynchronous=asynchronous)
        except CheckpointError as error:
            self._report.warn(f"{error}; training goes on")
        if not asynchronous:
            self.finalize()

    def finalize(self) -> None:
        """Complete what was begun, if anything was; a collective call."""
        try:
            saved = self._saver.finalize()
        except CheckpointError as error:
            self._report.warn(f"{error}; training goes on")
            return
        if saved is not None:
            self._report.saved(saved)
            self.newest = saved.folder

    def save_before_error(self, step: int) -> None:
        """Save all steps so far before an error ends the run that has left them whole; one that fails is told."""
        self.finalize()
        if step == 0 or (self.newest is not None and step_of(self.newest) == step):
            return
        try:
            self.save_now(step, taken=False)
        except CheckpointError as error:
            self._report.warn(str(error))

    def save_now(self, step: int, taken: bool) -> None:
        """Save a checkpoint that nothing follows. Errors: CheckpointError."""
        self.finalize()
        saved = self._saver.save(step, keep_all=not taken)
        self._report.saved(saved)
        self.newest = saved.folder

    def close(self) -> None:
        """Wait until this rank has deleted what is not kept; after the last collective of the run."""
        self._saver.close()
