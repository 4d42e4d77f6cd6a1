"""Real workers in training, started directly or by a launcher, as targets of faults."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.dist.loaded import LoadedProcess
from tests.dist.resumable import ROOT, command, overrides_of, steps

LIMIT_S = 240.0
STEPS, EVERY = 40, 3
CHANGES = (
    f"train.steps={STEPS}",
    f"checkpoint.interval={EVERY}",
    "train.schedule_steps=null",
    "model.config.num_hidden_layers=5",
    "parallel.timeout_s=8",
)


@dataclass(frozen=True)
class Job:
    """A started run.

    Attributes:
        run: Its run.dir.
        ranks: Number of workers.
        launched: Whether a launcher starts the workers.
        processes: What was started: the launch, or else the workers.
    """

    run: Path
    ranks: int
    launched: bool
    processes: list[subprocess.Popen[bytes] | LoadedProcess]

    def pid(self, rank: int) -> int | None:
        """The process of a worker by its own record, which is written before it trains; None if it does not run."""
        try:
            record = json.loads((self.run / f"workers/rank-{rank}.json").read_text())
            return int(record["pid"]) if record["state"] == "running" else None
        except (OSError, ValueError, KeyError):
            return None

    def has(self, pid: int) -> bool:
        """Whether the process is still a worker of this run; its id may have been reused."""
        if any(process.pid == pid and process.poll() is None for process in self.processes):
            return True
        try:
            return f"run.dir={self.run}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Wait for `processes` -> their exit codes. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + limit_s
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return max(steps(self.run), default=0) if (self.run / "metrics.jsonl").is_file() else 0


@contextlib.contextmanager
def job(text: Path, run: Path, ranks: int, launcher: str | None, *overrides: str) -> Iterator[Job]:
    """Start or resume a run; when the context ends, all its processes have ended."""
    argv = command(text, run, *CHANGES, *overrides)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for record in run.glob("workers/rank-*.json"):
        record.unlink()  # of an earlier start, whose processes have ended
    started: list[subprocess.Popen[bytes] | LoadedProcess] = []
    if launcher is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        rendezvous = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        variables = [rendezvous | {"MASTER_PORT": port, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        started += [LoadedProcess(argv, environment | rank_variables) for rank_variables in variables]
    else:
        restarts = ["--max-restarts", "3"] if launcher == "torchrun --max-restarts" else []
        options = ["--launcher", launcher.split()[0], "--workers", str(ranks), *restarts]
        launch = [sys.executable, "-m", "dist_moe", "launch", "configs/debug.yaml", *overrides_of(text, run, *CHANGES)]
        out = subprocess.DEVNULL
        started.append(
            subprocess.Popen([*launch, *overrides, *options], cwd=ROOT, env=environment, stdout=out, stderr=out)
        )
    running = Job(run, ranks, launcher is not None, started)
    try:
        yield running
    finally:
        end(running)


def end(running: Job) -> None:
    """Kill the remaining processes by their ids, and wait for the started ones."""
    pids = [pid for rank in range(running.ranks) if (pid := running.pid(rank)) is not None]
    for process in running.processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if running.has(pid):
                os.kill(pid, signal.SIGKILL)


def state_of(pid: int) -> str:
    """The state of a process as in /proc (one letter); "gone" if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
