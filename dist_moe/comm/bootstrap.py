"""Joins this process to the job: backend, device and process group, for the length of a context."""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_moe.comm.place import Place, PlaceError


@dataclass(frozen=True)
class World:
    """A joined process group: the place, the device that this worker computes on, and the backend's name."""

    place: Place
    device: torch.device
    backend: str


def choose_backend(requested: str, place: Place) -> str:
    """The backend for `parallel.backend`: nccl computes on CUDA, one device for each worker, and gloo on the CPU.

    "auto" is nccl where this host has a CUDA device for each of its workers, gloo elsewhere. Errors: PlaceError for
    nccl with fewer devices than workers.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        return "nccl" if devices >= place.local_world_size else "gloo"
    if requested == "nccl" and devices < place.local_world_size:
        raise PlaceError(
            f"parallel.backend=nccl needs a CUDA device for each of this host's {place.local_world_size} workers and "
            f"torch sees {devices}; start fewer workers, or use parallel.backend=auto or gloo"
        )
    return requested


def set_threads(threads: int | str, place: Place) -> None:
    """Give this worker its share of the host's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads if isinstance(threads, int) else max(1, cores // place.local_world_size))


@contextlib.contextmanager
def join_world(place: Place, backend: str, timeout_s: float) -> Iterator[World]:
    """Join the job's process group for the length of the context.

    A world of one needs no launcher: it meets itself on a free port. Every collective ends after `timeout_s`
    seconds with an error instead of waiting for ever. A group that exists already (a test's) is used and left alone.
    """
    backend = choose_backend(backend, place)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
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
            f"{' and '.join(missing)} not set: {place.world_size} workers ({place.launcher}) need the address of "
            "rank 0; export both in the launcher's command, for example -x MASTER_ADDR=host0 -x MASTER_PORT=29500"
        )
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
    )
