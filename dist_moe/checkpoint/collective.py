"""Runs work on every rank, and raises on all ranks if it fails on one."""

from collections.abc import Callable
from typing import Any, TypeVar

from safetensors import SafetensorError

from dist_moe.checkpoint.errors import JobCheckpointError
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.objects import all_gather_objects
from dist_moe.errors import UserError

Result = TypeVar("Result")


def run_on_all_ranks(mesh: Mesh, what: str, work: Callable[[], Result], kind: Any = None) -> list[Result]:
    """Run `work` on every rank. A collective call.

    Args:
        mesh: The ranks.
        what: The beginning of the error message, such as "step-000020 could not be saved".
        work: Runs on this rank; if it calls collectives, it must take part in all of them on
            every rank, also after a failure, as `broadcast_files` does.
        kind: The type of its result, as `all_gather_objects` takes it; None where it has none.

    Returns:
        The result of each rank, in rank order.

    Raises:
        JobCheckpointError: On every rank, if `work` failed on one.
    """
    result: Result | None = None
    failure = None
    # A rank that raised here would leave the others waiting in the collective below.
    try:
        result = work()
    except (OSError, SafetensorError, UserError, RuntimeError, ValueError, MemoryError) as error:
        failure = str(error) or type(error).__name__
    own: Any = (failure, result)
    either: Any = tuple[str, None] | tuple[None, kind]
    outcomes = all_gather_objects(own, either) if mesh.world_size > 1 else [own]
    for rank, (message, _) in enumerate(outcomes):
        if message is not None:
            raise JobCheckpointError(f"{what}: {message} (rank {rank})")
    return [value for _, value in outcomes]
