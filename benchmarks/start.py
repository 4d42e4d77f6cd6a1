"""Measures how long `dist-moe launch` takes from its start to the first line of metrics, beside the imports alone."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.cases import PACKAGE, StartCase
from benchmarks.environment import ROOT
from benchmarks.row import LIMIT, Row

LIMIT_S = 180.0
POLL_S = 0.02
OVERRIDES = ("train.steps=1", "observe.interval=1", "observe.validation_sequences=1", "checkpoint.interval=0")
IMPORTS = "import torch, transformers, deepspeed"


def measure_start(case: StartCase, rounds: int) -> list[Row]:
    """Measure each launcher once in every round, and the imports of as many processes at the same time.

    The first round is not counted: it reads the files of all packages from the disk.

    Raises:
        RuntimeError: A launch failed; the message has the end of its output.
    """
    measures: dict[str, Callable[[], float]] = {LIMIT: partial(import_seconds, case.workers)}
    measures |= {f"{PACKAGE}-{name}": partial(launch_seconds, name, case.workers) for name in case.launchers}
    rows = [Row(name) for name in measures]
    for number in range(rounds + 1):
        for row in rows:
            seconds = measures[row.name]()
            if number > 0:
                row.seconds.append(seconds)
    return rows


def import_seconds(workers: int) -> float:
    """Return the seconds in which `workers` processes start Python and import the packages that a worker needs."""
    began_s = time.perf_counter()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen((sys.executable, "-W", "ignore", "-c", IMPORTS), env=environment) for _ in range(workers)
    ]
    for process in processes:
        process.wait(LIMIT_S)
    return time.perf_counter() - began_s


def launch_seconds(launcher: str, workers: int) -> float:
    """Return the seconds from the start of a launch to the first line of metrics.jsonl; "none" is a single worker."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        arguments = [str(ROOT / "configs" / "debug.yaml"), f"run.dir={name}/run", *OVERRIDES]
        if launcher == "none":
            command = ["train", *arguments]
        else:
            command = ["launch", *arguments, "--launcher", launcher, "--workers", str(workers)]
        began_s = time.perf_counter()
        with (Path(name) / "log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "dist_moe", *command], stdout=log, stderr=log, cwd=ROOT)
            seconds = wait_for_line(Path(name) / "run" / "metrics.jsonl", process) - began_s
            process.wait(LIMIT_S)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n" + (Path(name) / "log").read_text()[-1000:])
        return seconds


def wait_for_line(path: Path, process: subprocess.Popen[bytes]) -> float:
    """Wait until a file has a line or the process has ended, and return the time."""
    deadline_s = time.perf_counter() + LIMIT_S
    while time.perf_counter() < deadline_s and process.poll() is None:
        if path.is_file() and path.stat().st_size:
            break
        time.sleep(POLL_S)
    return time.perf_counter()
