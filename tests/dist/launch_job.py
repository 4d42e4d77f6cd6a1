"""`dist-moe launch` for the tests of launching, with their own worker: called as LAUNCHER WORKERS CONFIG RESTARTS."""

import os
import sys
from pathlib import Path

from dist_moe.config import load_config
from dist_moe.errors import UserError
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher, load_launcher
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.run_job import run
from dist_moe.worker.network import LOOPBACK


def main(launcher: str, workers: int, path: str, restarts: int) -> None:
    """Run the job, write its message to stderr after "outcome: ", and exit with its code."""
    config = load_config(path)
    loaded = load_launcher(launcher)
    assert isinstance(loaded, ProcessLauncher)
    request = LaunchRequest(
        config,
        path,
        asked_workers=workers,
        max_restarts=restarts if "max_restarts" in loaded.options else 0,
        module="tests.dist.launch_worker",
    )
    command = loaded.command(request, os.environ)
    try:
        with WorkerMonitor(LOOPBACK, workers, Path(config.run.dir), multi_host=False) as monitor:
            outcome = run(command, config.run.dir, monitor)
    except UserError as error:
        sys.exit(f"outcome: {error}")
    sys.stderr.write(f"outcome: {outcome.message}\n")
    sys.exit(outcome.code)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
