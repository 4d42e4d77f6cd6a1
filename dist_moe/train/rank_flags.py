"""Per-rank flags, reduced together with the token counts of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RankFlags:
    """The flags of one rank.

    Attributes:
        stop_requested: A signal asked this rank to stop.
        shard_written: This rank's files of the checkpoint in progress are written.
        data_changed: The data file that was modified since it was opened, and how; "" if none was.
    """

    stop_requested: bool = False
    shard_written: bool = False
    data_changed: str = ""

    def as_ints(self) -> list[int]:
        """Return the flags as integers to sum over the ranks."""
        return [int(self.stop_requested), int(self.shard_written), int(bool(self.data_changed))]


NO_FLAGS = RankFlags()


class JobFlags(NamedTuple):
    """The flags of all ranks, equal on every rank.

    Attributes:
        stop_requested: Any rank was asked to stop.
        shard_written: Every rank's files of the checkpoint in progress are written.
        data_changed: Any rank's data file was modified.
    """

    stop_requested: bool
    shard_written: bool
    data_changed: bool


def job_flags(summed: Sequence[int], world_size: int) -> JobFlags:
    """Return the flags of all ranks from the sums of `RankFlags.as_ints` over them."""
    stop_requested, shard_written, data_changed = summed
    return JobFlags(stop_requested > 0, shard_written == world_size, data_changed > 0)
