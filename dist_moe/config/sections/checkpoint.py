"""The fields of saving and resuming."""

from pydantic import Field

from dist_moe.section import Section


class CheckpointConfig(Section):
    """When the run is saved, and from where it goes on."""

    interval: int = Field(
        default=0, ge=0, description="the optimizer steps between checkpoints (0: one at the end only)"
    )
    resume: str = Field(
        default="auto",
        min_length=1,
        description="the checkpoint to go on from: auto (the newest good one in run.dir, if there is one), never, or "
        "the path of a step-NNNNNN folder",
    )
    asynchronous: bool = Field(
        default=True,
        description="whether training goes on while the files of a checkpoint are written, from a copy in memory",
    )
    keep_last: int = Field(default=0, ge=0, description="the newest checkpoints that are kept (0: all)")
    keep_every: int = Field(
        default=0, ge=0, description="the steps whose multiples are kept beside the newest (0: none; with keep_last)"
    )
