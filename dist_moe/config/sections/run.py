"""The fields of the run as a whole."""

from typing import Annotated

from pydantic import Field

from dist_moe.section import Auto, Section, UserPath


class RunConfig(Section):
    """The run as a whole."""

    dir: UserPath = Field(
        default="runs/default",
        description="the folder that the run writes to (created if missing)",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="the seed of the initial weights and of the order of the data (0 to 4294967295)",
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | Auto = Field(
        default="auto",
        description="the CPU threads of one operation in each worker (1 to 4096), or auto (the cores of the host "
        "divided by its workers)",
    )
    bind_cores: bool = Field(
        default=True,
        description="whether each worker on the CPU is bound to its own share of the cores of its host, where all "
        "workers of the host together have at most as many threads as there are cores",
    )
    keep_memory: bool = Field(
        default=True,
        description="whether a worker on the CPU keeps freed memory for later tensors, which is faster, instead of "
        "returning it to the system (with glibc)",
    )
