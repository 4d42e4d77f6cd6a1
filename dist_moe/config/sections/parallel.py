"""The fields that divide the work among the workers."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from dist_moe.section import Auto, Section


class ParallelConfig(Section):
    """How the work is divided among the workers."""

    expert_parallel: Annotated[int, Field(ge=1)] | Auto = Field(
        default="auto",
        description="the number of workers that share one set of experts; it divides the workers and the "
        "experts (auto: the largest number that does)",
    )
    all_to_all: Literal["auto", "flat", "hierarchical"] = Field(
        default="auto",
        description="the way of tokens to their experts: flat (one all-to-all), hierarchical (first to each host, once "
        "for all experts there, then within it), or auto (hierarchical between hosts with as many workers each)",
    )
    zero_stage: Literal[0, 1, 2] = Field(
        default=1,
        description="the ZeRO stage of DeepSpeed: 0 nothing is sharded, 1 optimizer states, 2 gradients too",
    )
    backend: Literal["auto", "nccl", "gloo", "mpi"] = Field(
        default="auto",
        description="the library of the collectives: nccl (GPU), gloo (CPU), mpi (CPU, under mpirun), or auto (nccl "
        "where each worker has a GPU of its own, else mpi where mpirun started them, else gloo)",
    )
    timeout_s: float = Field(default=600, gt=0, description="the time limit of each collective, in seconds")

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _stage_is_no_boolean(cls, stage: Any) -> Any:
        if isinstance(stage, bool):
            raise PydanticCustomError("literal_error", "Input should be 0, 1 or 2")
        return stage
