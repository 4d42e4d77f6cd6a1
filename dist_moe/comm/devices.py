"""The device of each worker: which backend `parallel.backend` means, and which CUDA device is whose."""

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dist_moe.text import counted
from dist_moe.worker.contract import VISIBLE_DEVICES_VARIABLE
from dist_moe.worker.rank_info import RankInfo, RankInfoError

logger = logging.getLogger(__name__)
MPI_LAUNCHERS = ("openmpi", "mpich")
# Device files of GPUs that torch can use, below /dev: NVIDIA, the same in WSL, and AMD.
GPU_FILES = ("nvidia[0-9]*", "dxg", "kfd")
AMD_VISIBLE_DEVICES = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# Values by which the user hides the devices: "" and -1 of CUDA, the others of NVIDIA's container runtime.
HIDDEN = ("", "-1", "void", "none", "NoDevFiles")


@dataclass(frozen=True)
class HostDevices:
    """What this process finds on its host.

    Attributes:
        count: The number of CUDA devices that torch can use.
        files: The device files of GPUs.
        torch_build: What torch is built for: "CUDA 12.8", "ROCm 6.4" or "the CPU alone".
        has_mpi4py: Whether mpi4py is installed.
    """

    count: int
    files: Sequence[str] = ()
    torch_build: str = "the CPU alone"
    has_mpi4py: bool = False


@dataclass(frozen=True)
class DeviceChoice:
    """The backend and device of a worker.

    Attributes:
        backend: nccl, gloo or mpi.
        index: The number of the CUDA device among those that this process sees; None for the CPU.
        notes: What the user may not expect, a line each.
    """

    backend: str
    index: int | None = None
    notes: tuple[str, ...] = ()


def find_devices() -> HostDevices:
    """Return what this process finds on its host."""
    files = [str(path) for pattern in GPU_FILES for path in sorted(Path("/dev").glob(pattern))]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return HostDevices(count, files, build, importlib.util.find_spec("mpi4py") is not None)


def choose_device(
    requested: str, rank_info: RankInfo, devices: HostDevices, environment: Mapping[str, str]
) -> DeviceChoice:
    """Return backend and device for `parallel.backend`: nccl with one CUDA device per worker, gloo and mpi on the CPU.

    "auto" is nccl where each worker of this host has a CUDA device; otherwise mpi where MPI started the job and mpi4py
    is installed; otherwise gloo. Where there is a GPU that is not used, a note says so.

    All workers of a host must choose the same backend, so nothing here depends on the values of their local ranks.

    Args:
        requested: auto, nccl, gloo or mpi.
        rank_info: The rank of this worker.
        devices: What this process finds.
        environment: Its variables.

    Raises:
        RankInfoError: nccl with fewer devices than workers, or mpi without mpi4py.
    """
    if requested == "mpi" and not devices.has_mpi4py:
        raise RankInfoError(
            "parallel.backend=mpi needs mpi4py, which is not installed; install dist-moe-train[mpi], or use "
            "parallel.backend=gloo"
        )
    if requested in ("gloo", "mpi"):
        return DeviceChoice(requested)
    if devices.count >= rank_info.local_world_size:
        return DeviceChoice("nccl", rank_info.local_rank)
    if devices.count and gives_each_its_own(environment):
        return DeviceChoice("nccl", 0)
    reason = _why_too_few(rank_info.local_world_size, devices, environment)
    if requested == "nccl":
        raise RankInfoError(
            f"parallel.backend=nccl needs a CUDA device for each of this host's "
            f"{counted(rank_info.local_world_size, 'worker')}, "
            f"and torch finds {devices.count}{f' ({reason})' if reason else ''}; start fewer workers, or use "
            "parallel.backend=auto or gloo"
        )
    backend = "mpi" if rank_info.launcher in MPI_LAUNCHERS and devices.has_mpi4py else "gloo"
    if not reason:
        return DeviceChoice(backend)
    return DeviceChoice(backend, None, (f"parallel.backend=auto is {backend} on the CPU, though {reason}",))


def gives_each_its_own(environment: Mapping[str, str]) -> bool:
    """Return whether each worker sees devices that no other worker of its host sees.

    Slurm does so for --gpus-per-task; others set CUDA_VISIBLE_DEVICES to one device for each worker. Whether the
    devices differ is checked by `claim_device`.
    """
    if environment.get("SLURM_GPUS_PER_TASK") or "gpu" in environment.get("SLURM_TRES_PER_TASK", ""):
        return True
    lists = (environment.get(name, "").strip() for name in (VISIBLE_DEVICES_VARIABLE, *AMD_VISIBLE_DEVICES))
    return any(visible not in HIDDEN and "," not in visible for visible in lists)


def _why_too_few(workers: int, devices: HostDevices, environment: Mapping[str, str]) -> str:
    """Return which GPU is there though torch finds too few, and a remedy; "" where there is none, or none is wanted."""
    visible = environment.get(VISIBLE_DEVICES_VARIABLE)
    if visible is not None and visible.strip() in HIDDEN:
        return ""
    if devices.count:
        found = f"torch finds {counted(devices.count, 'CUDA device')} for {counted(workers, 'worker')}"
        return (
            f"{found} of this host, and nccl needs one for each; start {devices.count} on this host, or set "
            "parallel.backend=gloo if the CPU is meant"
        )
    container = environment.get("NVIDIA_VISIBLE_DEVICES", "")
    if devices.files:
        seen = f"{devices.files[0]} is there"
    elif container not in HIDDEN:
        seen = f"NVIDIA_VISIBLE_DEVICES={container} asks for GPUs"
    else:
        return ""
    if visible is not None:
        seen += f" (with {VISIBLE_DEVICES_VARIABLE}={visible})"
    remedy = (
        "install the build of torch for this GPU"
        if devices.torch_build == "the CPU alone"
        else "check the driver by nvidia-smi, and that the container or job is given the GPU"
    )
    return (
        f"{seen}: torch is built for {devices.torch_build} and finds no device; {remedy}, or set parallel.backend=gloo "
        "if the CPU is meant"
    )


def choose_backend(requested: str, rank_info: RankInfo) -> str:
    """Return the backend that `choose_device` chooses for this process.

    Raises:
        RankInfoError: As for `choose_device`.
    """
    return choose_device(requested, rank_info, find_devices(), os.environ).backend


def log_choice(choice: DeviceChoice, rank_info: RankInfo) -> None:
    """Warn of what the environment and the choice of the device have that the user may not expect, once per host."""
    lines = (*(rank_info.notes if rank_info.rank == 0 else ()), *(choice.notes if rank_info.local_rank == 0 else ()))
    for line in lines:
        logger.warning("%s", line)


def claim(store: dist.Store, rank: int, backend: str, device: str | None) -> None:
    """Record this worker's backend and device in the store of the job, and compare them with those of other workers.

    NCCL fails with a message of its own where two workers share a device, and workers with different backends wait
    for each other.

    Args:
        store: The store.
        rank: The rank of this worker.
        backend: Its backend.
        device: The identity of its CUDA device (UUID), None for the CPU.

    Raises:
        RankInfoError: Another worker has the same device, or another backend.
    """
    first, _, first_backend = _claimed(store, "backend", f"{rank} {backend}").partition(" ")
    if first_backend != backend:
        raise RankInfoError(
            f"rank {first} uses the backend {first_backend}, and rank {rank} uses {backend}, so they would wait for "
            "each other; give every host a device for each of its workers, or set parallel.backend=gloo"
        )
    if device is None:
        return
    owner = _claimed(store, f"device/{device}", str(rank))
    if owner != str(rank):
        visible = os.environ.get(VISIBLE_DEVICES_VARIABLE)
        raise RankInfoError(
            f"ranks {owner} and {rank} would share the device {device} ({VISIBLE_DEVICES_VARIABLE}={visible}, "
            f"LOCAL_RANK={os.environ.get('LOCAL_RANK')}); give each worker a device of its own, start them with a "
            "launcher that sets LOCAL_RANK, or set parallel.backend=gloo"
        )


def device_identity(device: torch.device) -> str | None:
    """Return the UUID of a CUDA device, None for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _claimed(store: dist.Store, key: str, value: str) -> str:
    """Set a key unless another worker has set it, and return its value."""
    answer = store.compare_set(f"dist_moe/{key}", "", value)
    return answer.decode() if isinstance(answer, bytes) else str(answer)
