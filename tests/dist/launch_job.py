"""`dist-moe launch` for the tests of launching, with their own worker: called as LAUNCHER WORKERS CONFIG."""

import sys

from dist_moe.config import load_config
from dist_moe.launch.command import LaunchError
from dist_moe.launch.deepspeed import deepspeed_command
from dist_moe.launch.mpirun import mpirun_command
from dist_moe.launch.process import run
from dist_moe.launch.torchrun import torchrun_command


def main(launcher: str, workers: int, path: str) -> None:
    """Runs the job, writes its message below a line of its own, and leaves with its code."""
    config = load_config(path)
    make = {"deepspeed": deepspeed_command, "torchrun": torchrun_command, "mpirun": mpirun_command}[launcher]
    command = make(config, workers, path, module="tests.dist.launch_worker")
    try:
        outcome = run(command, config.run.dir, workers)
    except LaunchError as error:
        sys.exit(f"outcome: {error}")
    sys.stderr.write(f"outcome: {outcome.message}\n")
    sys.exit(outcome.code)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
