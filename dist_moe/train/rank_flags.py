"""Per-rank flags, reduced together with the token counts of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dist_moe.data.mmap_files import reject_change
from dist_moe.engine.deepspeed import Engine
from dist_moe.engine.train_state import RunBatch
from dist_moe.train.step import GlobalCounts, reduce_counts


@dataclass(frozen=True)
class RankFlags:
    """The flags of one rank.

    Attributes:
        stop_requested: A signal asked this rank to stop.
        shard_written: This rank's files of the checkpoint in progress are written, or have failed.
        data_changed: The data file that was modified since it was opened, and how; "" if none was.
        save_due: By this rank's clock a checkpoint is due; only rank 0 looks at its clock.
    """

    stop_requested: bool = False
    shard_written: bool = False
    data_changed: str = ""
    save_due: bool = False

    def as_ints(self) -> list[int]:
        """Return the flags as integers to sum over the ranks."""
        return [int(self.stop_requested), int(self.shard_written), int(bool(self.data_changed)), int(self.save_due)]


NO_FLAGS = RankFlags()


class JobFlags(NamedTuple):
    """The flags of all ranks, equal on every rank.

    Attributes:
        stop_requested: Any rank was asked to stop.
        shard_written: Every rank's files of the checkpoint in progress are written, or have failed.
        data_changed: Any rank's data file was modified.
        save_due: A checkpoint is due by the clock of rank 0.
    """

    stop_requested: bool
    shard_written: bool
    data_changed: bool
    save_due: bool


def job_flags(summed: Sequence[int], world_size: int) -> JobFlags:
    """Return the flags of all ranks from the sums of `RankFlags.as_ints` over them."""
    stop_requested, shard_written, data_changed, save_due = summed
    return JobFlags(stop_requested > 0, shard_written == world_size, data_changed > 0, save_due > 0)


def exchange_flags(batches: Sequence[RunBatch], flags: RankFlags, engine: Engine) -> tuple[GlobalCounts, JobFlags]:
    """Reduce the token counts of a step and the flags of all ranks in ONE all-reduce. A collective call.

    Args:
        batches: This rank's micro-batches.
        flags: This rank's flags.
        engine: The engine of the run.

    Returns:
        The counts for `train_step`, and the flags of all ranks.

    Raises:
        DataError: A data file was modified on any rank; raised on every rank.
    """
    counts = reduce_counts(batches, engine.device, flags.as_ints())
    all_flags = job_flags(counts.extra, engine.mesh.world_size)
    if all_flags.data_changed:
        reject_change(flags.data_changed)
    return counts, all_flags
