"""The command of PyTorch's launcher, for workers on this host."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.launch.command import LOOPBACK, Command, free_port, worker_arguments, worker_environment


def torchrun_command(
    config: Config,
    workers: int,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    module: str = "dist_moe",
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`torchrun`, which starts `workers` processes `python -m MODULE train CONFIG_PATH OVERRIDES`.

    The rendezvous is a fixed address: `--standalone` waits for ever where the host's name does not resolve.
    Nothing is restarted: a run continues from its checkpoint, under a launch of its own.

    base: the environment to start from.
    """
    arguments = [
        *("--nnodes", "1"),
        *("--nproc-per-node", str(workers)),
        *("--master-addr", LOOPBACK),
        *("--master-port", str(free_port())),
        *("--local-addr", LOOPBACK),
        *("--max-restarts", "0"),
        # Without it every job leaves a folder behind in the system's place for temporary files.
        *("--log-dir", str(Path(config.run.dir) / "torchrun")),
        *("--module", module),
    ]
    argv = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        *arguments,
        *worker_arguments(config_path, overrides),
    )
    return Command("torchrun", argv, worker_environment(config, workers, base))
