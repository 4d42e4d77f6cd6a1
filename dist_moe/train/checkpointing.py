"""When a run saves, what it does if that fails, and what is told of it."""

from pathlib import Path

from dist_moe.checkpoint.async_saver import Saver
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import step_of
from dist_moe.train.reporting import Report


class Saves:
    """The saver of one run, and the report that is told of each checkpoint. Every rank has one and calls it alike.

    newest: the folder of the newest complete checkpoint; the one that the run goes on from, until there is another.
    A step that was skipped is saved as any other, but no older checkpoint is deleted then: the run may be lost.
    """

    def __init__(self, saver: Saver, report: Report, newest: Path | None) -> None:
        self._saver = saver
        self._report = report
        self.newest = newest

    @property
    def written(self) -> bool:
        """Whether this rank has written its files of a checkpoint that is not complete yet."""
        return self._saver.written

    def due(self, step: int, taken: bool, beside: bool) -> None:
        """Save a checkpoint that others will follow: one that fails is told, and costs no step of training.

        beside: whether training goes on while it is written.
        """
        self.finish()
        try:
            self._saver.begin(step, keep_all=not taken, beside=beside)
        except CheckpointError as error:
            self._report.warn(f"{error}; training goes on")
        if not beside:
            self.finish()

    def finish(self) -> None:
        """Complete what was begun, if anything was; a collective call."""
        try:
            saved = self._saver.finish()
        except CheckpointError as error:
            self._report.warn(f"{error}; training goes on")
            return
        if saved is not None:
            self._report.saved(saved)
            self.newest = saved.folder

    def rescue(self, step: int) -> None:
        """Save all steps so far before an error ends the run that has left them whole; one that fails is told."""
        self.finish()
        if step == 0 or (self.newest is not None and step_of(self.newest) == step):
            return
        try:
            self.now(step, taken=False)
        except CheckpointError as error:
            self._report.warn(str(error))

    def now(self, step: int, taken: bool) -> None:
        """Save a checkpoint that nothing follows. Errors: CheckpointError."""
        self.finish()
        saved = self._saver.save(step, keep_all=not taken)
        self._report.saved(saved)
        self.newest = saved.folder

    def close(self) -> None:
        """Wait until this rank has deleted what is not kept; after the last collective of the run."""
        self._saver.close()
