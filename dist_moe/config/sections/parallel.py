"""The fields of the distribution of work over the workers."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from dist_moe.section import Auto, Section


class ParallelConfig(Section):
    """How the work is distributed over the workers."""

    expert_parallel: Annotated[int, Field(ge=1)] | Auto = Field(
        default="auto",
        description="the number of workers that share one set of experts, a divisor of the workers and of the experts, "
        "or auto (the largest one)",
    )
    all_to_all: Literal["auto", "flat", "hierarchical"] = Field(
        default="auto",
        description="the algorithm that dispatches tokens to their experts: flat (one all-to-all), hierarchical (one "
        "copy to each host, then within the host), or auto (hierarchical across hosts with equal numbers of workers)",
    )
    shared_memory: bool = Field(
        default=True,
        description="whether workers on the CPU exchange tokens through shared memory, where all workers that share "
        "the experts are on one host, and within a host where all_to_all is hierarchical",
    )
    zero_stage: Literal[0, 1, 2] = Field(
        default=1,
        description="the ZeRO stage of DeepSpeed: 0 (nothing is sharded), 1 (optimizer states) or 2 (gradients too)",
    )
    backend: Literal["auto", "nccl", "gloo", "mpi"] = Field(
        default="auto",
        description="the backend of the collectives: nccl (GPU), gloo (CPU), mpi (CPU, under mpirun), or auto (nccl "
        "where each worker has its own GPU, else mpi under mpirun, else gloo)",
    )
    timeout_s: float = Field(
        default=600, ge=1, le=2e6, description="the timeout of each collective in seconds (1 to 2e6, 23 days)"
    )

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _stage_is_no_boolean(cls, stage: Any) -> Any:
        if isinstance(stage, bool):
            raise PydanticCustomError("literal_error", "Input should be 0, 1 or 2")
        return stage
