"""The command of DeepSpeed's own launcher, for workers on this host."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.launch.command import (
    LOOPBACK,
    Command,
    LaunchError,
    free_port,
    worker_arguments,
    worker_environment,
)

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
KEPT_DEVICES = "DIST_MOE_VISIBLE_DEVICES"
# Under /dev, where the drivers of NVIDIA, of Windows' subsystem, of AMD and of Intel show a device.
DEVICE_FILES = ("nvidia*", "dxg", "kfd", "dri/renderD*", "accel*")


def deepspeed_command(
    config: Config,
    workers: int,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    module: str = "dist_moe",
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`deepspeed`, which starts `workers` processes `python -m MODULE train CONFIG_PATH OVERRIDES`.

    The launcher writes 0 to N-1 into CUDA_VISIBLE_DEVICES, whatever stood there. What stood there goes along
    as DIST_MOE_VISIBLE_DEVICES, and the worker puts it back.

    base: the environment to start from. A LaunchError if this Python has no `deepspeed` beside it.
    """
    program = Path(sys.executable).parent / "deepspeed"
    if not program.is_file():
        raise LaunchError(
            f"{program} is not there, and --launcher deepspeed needs it; "
            f"install deepspeed for {sys.executable}, or use --launcher torchrun"
        )
    environment = worker_environment(config, workers, base)
    if VISIBLE_DEVICES in base:
        environment[KEPT_DEVICES] = base[VISIBLE_DEVICES]
    if not any(any(Path("/dev").glob(pattern)) for pattern in DEVICE_FILES):
        # Each of DeepSpeed's processes would look for a device, and warn of the CPU that it falls back to.
        environment["DS_ACCELERATOR"] = base.get("DS_ACCELERATOR", "cpu")
    arguments = [
        # A list of hosts that another job keeps at the default place would send this one to those hosts.
        *("--hostfile", os.devnull),
        *("--num_accelerators", str(workers)),
        *("--master_addr", LOOPBACK),
        *("--master_port", str(free_port())),
        *("--log_level", "error"),
        "--no_local_rank",
        "--module",
        module,
    ]
    argv = (sys.executable, str(program), *arguments, *worker_arguments(config_path, overrides))
    return Command("deepspeed", argv, environment)
