"""Work that may fail on one rank, and then fails on all."""

from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_gather_objects
from dist_moe.errors import UserError

Result = TypeVar("Result")


def run_on_all_ranks(mesh: Mesh, told: str, work: Callable[[], Result]) -> list[Result]:
    """Do `work` on every rank -> the result of each; CheckpointError on all of them where it fails on one."""
    result: Result | None = None
    failure = None
    try:
        result = work()
    except (OSError, SafetensorError, UserError, RuntimeError, ValueError, MemoryError) as error:
        failure = str(error) or type(error).__name__
    answers = all_gather_objects((failure, result)) if mesh.world_size > 1 else [(failure, result)]
    for rank, (failed, _) in enumerate(answers):
        if failed is not None:
            raise CheckpointError(f"{told}: {failed} (rank {rank})")
    return [found for _, found in answers]  # type: ignore[misc]  # None only where `work` returns it
