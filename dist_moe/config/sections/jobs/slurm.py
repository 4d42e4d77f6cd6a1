"""The fields of a job under Slurm."""

from typing import Annotated

from pydantic import Field, model_validator

from dist_moe.config.sections.cluster import Name
from dist_moe.errors import Violation
from dist_moe.section import Section, broken_rules


class SlurmConfig(Section):
    """A Slurm job (sbatch)."""

    nodes: int = Field(default=1, ge=1, description="the number of nodes (1 or more)")
    tasks_per_node: int = Field(default=1, ge=1, description="the workers on each node, one per device (1 or more)")
    cpus_per_task: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="the CPU cores of each worker, or null (the default of Slurm)"
    )
    gpus_per_node: int = Field(default=0, ge=0, description="the GPUs of each node (0: none)")
    partition: Name | None = Field(default=None, description="the partition, or null (the default of Slurm)")
    account: Name | None = Field(default=None, description="the account to charge, or null (the default of Slurm)")
    minutes: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="the time limit in minutes (1 or more), or null (that of the partition)"
    )
    signal_s: int = Field(
        default=120,
        ge=0,
        description="the seconds before the time limit at which the workers receive SIGUSR1, save a checkpoint and the "
        "job is queued again (0: never)",
    )
    job_name: Name = Field(default="dist-moe", description="the name of the job")

    @model_validator(mode="after")
    def _signal_within_the_limit(self) -> "SlurmConfig":
        if self.minutes is not None and self.signal_s >= self.minutes * 60:
            rule = f"is not less than the time limit of slurm.minutes={self.minutes}"
            raise broken_rules([Violation("slurm.signal_s", self.signal_s, rule, "give less, or 0 for no signal")])
        return self
