"""The backend and device of each worker, as a function of its rank, of what the host has, and of the environment."""

import logging

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm.devices import (
    DeviceChoice,
    HostDevices,
    choose_backend,
    choose_device,
    claim,
    device_identity,
    find_devices,
    log_choice,
)
from dist_moe.worker.rank_info import RankInfo, RankInfoError, rank_info_from_env
from tests.unit.worker import launcher_environments as env

CPU_ONLY = HostDevices(0)
ALONE = RankInfo()
THIRD_OF_FOUR = RankInfo(2, 4, 2, 4, "env")


@pytest.mark.parametrize(
    ("requested", "rank_info", "devices", "environment", "expected"),
    [
        ("auto", ALONE, CPU_ONLY, {}, DeviceChoice("gloo")),
        ("auto", ALONE, HostDevices(1), {}, DeviceChoice("nccl", 0)),
        ("auto", ALONE, HostDevices(8), {}, DeviceChoice("nccl", 0)),
        ("auto", THIRD_OF_FOUR, HostDevices(4), {}, DeviceChoice("nccl", 2)),
        ("nccl", THIRD_OF_FOUR, HostDevices(8), {}, DeviceChoice("nccl", 2)),
        ("gloo", THIRD_OF_FOUR, HostDevices(8), {}, DeviceChoice("gloo")),
        # One GPU in each pod: the GPU is used, and it is the first that the pod sees.
        ("auto", rank_info_from_env(env.PYTORCHJOB), HostDevices(1), {}, DeviceChoice("nccl", 0)),
        ("auto", rank_info_from_env(env.SRUN_PMI2), HostDevices(1), {}, DeviceChoice("nccl", 0)),
        # Slurm --gpus-per-task, or a launcher that sets CUDA_VISIBLE_DEVICES of each worker.
        ("auto", THIRD_OF_FOUR, HostDevices(1), {"SLURM_GPUS_PER_TASK": "1"}, DeviceChoice("nccl", 0)),
        ("auto", THIRD_OF_FOUR, HostDevices(2), {"SLURM_GPUS_PER_TASK": "2"}, DeviceChoice("nccl", 0)),
        ("auto", THIRD_OF_FOUR, HostDevices(1), {"SLURM_TRES_PER_TASK": "gres/gpu:1"}, DeviceChoice("nccl", 0)),
        ("nccl", THIRD_OF_FOUR, HostDevices(1), {"CUDA_VISIBLE_DEVICES": "2"}, DeviceChoice("nccl", 0)),
        ("nccl", THIRD_OF_FOUR, HostDevices(1), {"CUDA_VISIBLE_DEVICES": "GPU-1b2c"}, DeviceChoice("nccl", 0)),
        ("auto", THIRD_OF_FOUR, HostDevices(1), {"ROCR_VISIBLE_DEVICES": "2"}, DeviceChoice("nccl", 0)),
        # MPI on the CPU.
        ("auto", RankInfo(0, 2, 0, 2, "openmpi"), HostDevices(0, has_mpi4py=True), {}, DeviceChoice("mpi")),
        ("auto", RankInfo(0, 2, 0, 2, "slurm"), HostDevices(0, has_mpi4py=True), {}, DeviceChoice("gloo")),
        ("mpi", RankInfo(0, 2, 0, 2, "openmpi"), HostDevices(4, has_mpi4py=True), {}, DeviceChoice("mpi")),
        # The user hides the devices.
        ("auto", ALONE, HostDevices(0, ["/dev/nvidia0"]), {"CUDA_VISIBLE_DEVICES": ""}, DeviceChoice("gloo")),
        ("auto", ALONE, HostDevices(0, ["/dev/nvidia0"]), {"CUDA_VISIBLE_DEVICES": "-1"}, DeviceChoice("gloo")),
        ("auto", ALONE, CPU_ONLY, {"NVIDIA_VISIBLE_DEVICES": "void"}, DeviceChoice("gloo")),
    ],
)
def test_choose_device(
    requested: str, rank_info: RankInfo, devices: HostDevices, environment: dict[str, str], expected: DeviceChoice
) -> None:
    assert choose_device(requested, rank_info, devices, environment) == expected


@pytest.mark.parametrize(
    ("rank_info", "devices", "environment", "words"),
    [
        (
            THIRD_OF_FOUR,
            HostDevices(1),
            {},
            ["gloo on the CPU, though torch finds 1 CUDA device for 4 workers of this host", "start 1 on this host"],
        ),
        (
            THIRD_OF_FOUR,
            HostDevices(2),
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            ["though torch finds 2 CUDA devices for 4 workers", "or set parallel.backend=gloo if the CPU is meant"],
        ),
        (
            RankInfo(0, 2, 0, 2, "openmpi"),
            HostDevices(1, has_mpi4py=True),
            {},
            ["mpi on the CPU, though torch finds 1 CUDA device for 2 workers"],
        ),
        (
            ALONE,
            HostDevices(0, ["/dev/nvidia0"]),
            {},
            ["/dev/nvidia0 is there: torch is built for the CPU alone", "install the build of torch for this GPU"],
        ),
        (
            ALONE,
            HostDevices(0, ["/dev/nvidia0"], "CUDA 12.8"),
            {"CUDA_VISIBLE_DEVICES": "7"},
            ["/dev/nvidia0 is there (with CUDA_VISIBLE_DEVICES=7): torch is built for CUDA 12.8", "by nvidia-smi"],
        ),
        (
            ALONE,
            HostDevices(0, [], "CUDA 12.8"),
            {"NVIDIA_VISIBLE_DEVICES": "all"},
            ["NVIDIA_VISIBLE_DEVICES=all asks for GPUs", "that the container or job is given the GPU"],
        ),
    ],
)
def test_the_cpu_beside_a_gpu_is_said_for_auto_and_refused_for_nccl(
    rank_info: RankInfo, devices: HostDevices, environment: dict[str, str], words: list[str]
) -> None:
    choice = choose_device("auto", rank_info, devices, environment)
    assert choice.index is None and choice.backend in ("gloo", "mpi") and len(choice.notes) == 1
    for word in words:
        assert word in choice.notes[0]
    with pytest.raises(RankInfoError, match=rf"of this host's {rank_info.local_world_size} workers?, and torch finds"):
        choose_device("nccl", rank_info, devices, environment)


def test_mpi_without_mpi4py_is_an_error() -> None:
    with pytest.raises(RankInfoError, match=r"install dist-moe-train\[mpi\]"):
        choose_device("mpi", ALONE, CPU_ONLY, {})


def test_notes_are_warnings_once_for_each_host(caplog: pytest.LogCaptureFixture) -> None:
    choice = DeviceChoice("gloo", None, ("of the device",))
    with caplog.at_level(logging.WARNING):
        log_choice(choice, RankInfo(0, 4, 0, 2, "env", ("of the rank",)))
        log_choice(choice, RankInfo(1, 4, 1, 2, "env", ("of the rank",)))
        log_choice(choice, RankInfo(2, 4, 0, 2, "env", ("of the rank",)))
    assert [record.message for record in caplog.records] == ["of the rank", "of the device", "of the device"]


def test_find_devices_says_what_torch_finds() -> None:
    found = find_devices()
    assert found.count == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert (found.torch_build == "the CPU alone") == (not torch.version.cuda and not torch.version.hip)
    assert choose_backend("auto", ALONE) == ("nccl" if found.count else "gloo")
    assert device_identity(torch.device("cpu")) is None


def test_two_workers_with_one_device_are_refused() -> None:
    store = dist.HashStore()
    claim(store, 0, "nccl", "GPU-a")
    claim(store, 1, "nccl", "GPU-b")
    with pytest.raises(RankInfoError, match="ranks 0 and 2 would share the device GPU-a"):
        claim(store, 2, "nccl", "GPU-a")


def test_two_workers_with_different_backends_are_refused() -> None:
    store = dist.HashStore()
    claim(store, 3, "nccl", "GPU-a")
    with pytest.raises(RankInfoError, match="rank 3 uses the backend nccl, and rank 0 uses gloo, so they would wait"):
        claim(store, 0, "gloo", None)
