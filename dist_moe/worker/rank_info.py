"""The place of this process in the job, read from the environment of whichever launcher started it.

Without torch, so that a worker knows its rank, and can be named, before the slow imports begin.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_moe.errors import UserError


class RankInfoError(UserError, ValueError):
    """The environment names a place that cannot exist (value, rule and remedy in the message)."""


@dataclass(frozen=True)
class RankInfo:
    """The place of one worker in the job.

    rank and world_size count workers over all hosts, local_rank and local_world_size those of this host; launcher
    is the dialect that the values were read from ("env" covers deepspeed and torchrun; "none" is a world of one).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"


# launcher -> the variables that hold (rank, world size, local rank, local world size)
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
    """Read the worker's place from `environment`; without a launcher's variables it is a world of one.

    Errors: PlaceError where a value is no integer, or a rank is not below its world size.
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
                f"{name}={text!r} is not a whole number >= 0; the launcher sets it, so start the worker by one"
            )
        return int(text)

    rank, world_size = number(names[0], 0), number(names[1], 1)
    local_rank = number(names[2], 0)
    # DeepSpeed's launcher sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE; Slurm tells the tasks of a node only
    # if it was asked for a number of them, and then this rank knows of those up to itself.
    local_world_size = number(names[3], number("LOCAL_SIZE", world_size if launcher == "env" else local_rank + 1))
    if not rank < world_size:
        raise RankInfoError(
            f"{names[0]}={rank} must be below {names[1]}={world_size}; unset both, or start by a launcher"
        )
    if not local_rank < local_world_size:
        raise RankInfoError(
            f"{names[2]}={local_rank} must be below {names[3]}={local_world_size}; unset both, or start by a launcher"
        )
    return RankInfo(rank, world_size, local_rank, local_world_size, launcher)
