"""The fields of saving and resuming."""

from pydantic import Field

from dist_moe.section import Section, UserPath


class CheckpointConfig(Section):
    """When checkpoints are saved, and from which one the run resumes."""

    interval: int = Field(
        default=0,
        ge=0,
        description="the optimizer steps between checkpoints (0: only the one at the end, and those of "
        "interval_minutes)",
    )
    interval_minutes: float = Field(
        default=15.0,
        ge=0,
        allow_inf_nan=False,
        description="the minutes after which a checkpoint is saved besides those of interval, so that a crash loses no "
        "more; the next checkpoint replaces it (0: none)",
    )
    resume: UserPath = Field(
        default="auto",
        description="the checkpoint to resume from: auto (the newest valid one in run.dir, if any), never, or the path "
        "of a step-NNNNNN folder",
    )
    asynchronous: bool = Field(
        default=True,
        description="whether training continues while a checkpoint is written, from a copy in memory",
    )
    keep_last: int = Field(default=0, ge=0, description="the number of newest checkpoints to keep (0: all)")
    keep_every: int = Field(
        default=0, ge=0, description="the interval, in steps, of checkpoints that keep_last never deletes (0: none)"
    )
