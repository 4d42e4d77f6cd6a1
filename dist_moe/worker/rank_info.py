"""The rank of this process and the size of its job, read from the environment that a launcher sets.

It imports no torch, so that a worker knows its rank, and errors can name it, before the slow imports begin.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_moe.errors import UserError


class RankInfoError(UserError, ValueError):
    """The environment names a rank that cannot exist (value, rule and remedy in the message)."""


@dataclass(frozen=True)
class RankInfo:
    """The place of one worker in the job.

    Attributes:
        rank: Rank among the workers of all hosts.
        world_size: Number of workers on all hosts.
        local_rank: Rank among the workers of this host.
        local_world_size: Number of workers on this host.
        launcher: The key of `LAUNCHER_ENV_VARS` that the values come from ("env" is deepspeed's and torchrun's), or
            "none" for a single process that no launcher started.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"


# launcher -> the variables of (rank, world size, local rank, local world size). The order matters: torchrun inside a
# Slurm job sets its own variables in addition to Slurm's, and the workers are torchrun's.
LAUNCHER_ENV_VARS = {
    "env": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def rank_info_from_env(environment: Mapping[str, str]) -> RankInfo:
    """Read the worker's rank; without a launcher's variables it is rank 0 of 1.

    Args:
        environment: The variables, as in `os.environ`.

    Raises:
        RankInfoError: A value is not an integer, or a rank is not below its world size.
    """
    for launcher, names in LAUNCHER_ENV_VARS.items():
        if names[0] in environment and names[1] in environment:
            return _read_env_vars(environment, launcher, names)
    return RankInfo()


def _read_env_vars(environment: Mapping[str, str], launcher: str, names: tuple[str, str, str, str]) -> RankInfo:
    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default))
        if not text.strip().isdigit():
            raise RankInfoError(
                f"{name}={text!r} is not an integer >= 0; start the worker with a launcher, which sets this variable"
            )
        return int(text)

    rank, world_size = number(names[0], 0), number(names[1], 1)
    local_rank = number(names[2], 0)
    # DeepSpeed's launcher sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE. Slurm sets the number of tasks per
    # node only if the job asked for one; without it this rank knows only of the local ranks up to itself.
    local_world_size = number(names[3], number("LOCAL_SIZE", world_size if launcher == "env" else local_rank + 1))
    if not rank < world_size:
        raise RankInfoError(
            f"{names[0]}={rank} must be below {names[1]}={world_size}; unset both, or start the worker with a launcher"
        )
    if not local_rank < local_world_size:
        raise RankInfoError(
            f"{names[2]}={local_rank} must be below {names[3]}={local_world_size}; unset both, or start the worker "
            "with a launcher"
        )
    return RankInfo(rank, world_size, local_rank, local_world_size, launcher)
