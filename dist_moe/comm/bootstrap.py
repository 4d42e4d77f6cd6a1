"""Who am I: the place of this process in the job, read from the environment of whichever launcher started it."""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class PlaceError(ValueError):
    """The environment names a place that cannot exist (value, rule and remedy in the message)."""


@dataclass(frozen=True)
class Place:
    """The place of one worker in the job.

    rank and world_size count workers over all hosts, local_rank and local_world_size those of this host; launcher
    is the dialect that the values were read from ("env" covers deepspeed and torchrun; "none" is a world of one).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"


@dataclass(frozen=True)
class World:
    """A joined process group: the place, the device that this worker computes on, and the backend's name."""

    place: Place
    device: torch.device
    backend: str


# launcher -> the variables that hold (rank, world size, local rank, local world size)
DIALECTS = {
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


def read_place(environment: Mapping[str, str]) -> Place:
    """Read the worker's place from `environment`; without a launcher's variables it is a world of one.

    Errors: PlaceError where a value is no integer, or a rank is not below its world size.
    """
    for launcher, names in DIALECTS.items():
        if names[0] in environment and names[1] in environment:
            return _read_dialect(environment, launcher, names)
    return Place()


def _read_dialect(environment: Mapping[str, str], launcher: str, names: tuple[str, str, str, str]) -> Place:
    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default))
        if not text.strip().isdigit():
            raise PlaceError(
                f"{name}={text!r} is not a whole number >= 0; the launcher sets it, so start the worker by one"
            )
        return int(text)

    rank, world_size = number(names[0], 0), number(names[1], 1)
    local_rank = number(names[2], 0)
    # DeepSpeed's launcher sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE.
    local_world_size = number(names[3], number("LOCAL_SIZE", world_size if launcher == "env" else 1))
    if not rank < world_size:
        raise PlaceError(f"{names[0]}={rank} must be below {names[1]}={world_size}; unset both, or start by a launcher")
    if not local_rank < local_world_size:
        raise PlaceError(
            f"{names[2]}={local_rank} must be below {names[3]}={local_world_size}; unset both, or start by a launcher"
        )
    return Place(rank, world_size, local_rank, local_world_size, launcher)


def choose_backend(requested: str) -> str:
    """The backend for `parallel.backend`: "auto" is nccl where CUDA is, gloo elsewhere. Errors: nccl without CUDA."""
    if requested == "auto":
        return "nccl" if torch.cuda.is_available() else "gloo"
    if requested == "nccl" and not torch.cuda.is_available():
        raise PlaceError(
            "parallel.backend=nccl needs a CUDA device and torch sees none; use parallel.backend=auto or gloo"
        )
    return requested


@contextlib.contextmanager
def join_world(place: Place, backend: str, timeout_s: float) -> Iterator[World]:
    """Join the job's process group for the length of the context.

    A world of one needs no launcher: it meets itself on a free port. Every collective ends after `timeout_s`
    seconds with an error instead of waiting for ever. A group that exists already (a test's) is used and left alone.
    """
    backend = choose_backend(backend)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    elif torch.cuda.is_available() and place.world_size == 1:
        device = torch.device("cuda", 0)
    if dist.is_initialized():
        yield World(place, device, backend)
        return
    _fill_rendezvous(place)
    dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(place, device, backend)
    finally:
        dist.destroy_process_group()


def _fill_rendezvous(place: Place) -> None:
    """Write the variables that torch and DeepSpeed read their rendezvous from, where the launcher left them out."""
    if place.world_size == 1 and "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PlaceError(
            f"{' and '.join(missing)} not set: {place.world_size} workers ({place.launcher}) need the address of rank 0; "
            "export both in the launcher's command, for example -x MASTER_ADDR=host0 -x MASTER_PORT=29500"
        )
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
    )
