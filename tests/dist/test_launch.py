"""Jobs under real launchers: how they end after success, after a failure, and on request."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_moe.config import dump_config, load_config
from tests.selection import slow

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
WORKERS = 2
START_LIMIT_S = 120.0
END_LIMIT_S = 15.0
"""More than a job needs on a busy host, less than the time-outs of DeepSpeed, torchrun and gloo (30 s)."""

Start = Callable[..., "Job"]


class Job:
    """A running `launch_job` in a process group of its own, as under a shell; its processes share a variable."""

    def __init__(self, launcher: str, act: str, config: Path, restarts: int = 0) -> None:
        self.mark = f"LAUNCH_MARK={uuid.uuid4()}"
        self.run_dir = config.parent / "run"
        environment = {
            **os.environ,
            "LAUNCH_ACT": act,
            "LAUNCH_MARK": self.mark.partition("=")[2],
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.launch_job", launcher, str(WORKERS), str(config), str(restarts)],
            cwd=config.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_until_up(self) -> None:
        """Return once every worker has joined the process group."""
        assert self.process.stdout
        up = 0
        while up < WORKERS:
            line = self.process.stdout.readline()
            assert line, f"the job ended before:\n{self.process.communicate()[1]}"
            up += line.endswith("is up\n")

    def end(self, limit_s: float = END_LIMIT_S) -> tuple[int, str]:
        """Wait for the end, and return the exit code and the message for the user."""
        _, errors = self.process.communicate(timeout=limit_s)
        assert "outcome: " in errors, errors
        return self.process.returncode, errors.partition("outcome: ")[2].strip()

    def running(self) -> list[str]:
        """The command lines of its running processes, in any session."""
        lines = []
        for folder in Path("/proc").iterdir():
            try:
                if self.mark in (folder / "environ").read_text(errors="replace").split("\0"):
                    lines.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # not a process, or one that has just ended
                continue
        return lines


def write_config(folder: Path) -> Path:
    """Write the debug configuration with a run folder of its own."""
    config = folder / "run.yaml"
    changes = [f"run.dir={folder / 'run'}", "run.threads=1"]
    config.write_text(dump_config(load_config(ROOT / "configs" / "debug.yaml", changes)))
    return config


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(launcher, act, restarts=0)` starts a job and waits until its workers are up; it ends with the test."""
    config = write_config(tmp_path)
    jobs = []

    def start_job(launcher: str, act: str, restarts: int = 0) -> Job:
        jobs.append(Job(launcher, act, config, restarts))
        jobs[-1].wait_until_up()
        return jobs[-1]

    yield start_job
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGINT)
        job.process.communicate(timeout=END_LIMIT_S)


@pytest.mark.parametrize("launcher", ["deepspeed", slow("mpirun"), slow("torchrun")])
def test_a_successful_job_exits_with_0_and_without_a_message(start: Start, launcher: str) -> None:
    job = start(launcher, "finish")
    assert job.end() == (0, "")
    assert not job.running()
    assert not list(job.run_dir.glob("errors/*"))


@pytest.mark.parametrize("launcher", [slow("deepspeed"), slow("torchrun"), "mpirun"])
def test_the_first_rank_that_raises_is_reported(start: Start, launcher: str) -> None:
    job = start(launcher, "raise")
    report = job.run_dir / "errors" / "rank-1.txt"
    message = f"rank 1 failed with ValueError: boom\n\nin two paragraphs\n(traceback: {report})"
    assert job.end() == (1, message)
    assert not job.running()
    assert "launch_worker.py" in report.read_text()


@pytest.mark.parametrize(
    ("launcher", "act", "code"),
    [
        slow("deepspeed", "SIGKILL", 137),
        ("torchrun", "SIGKILL", 137),
        slow("torchrun", "SIGTERM", 143),
        slow("mpirun", "SIGKILL", 137),
    ],
)
def test_a_rank_that_is_killed_is_reported(start: Start, launcher: str, act: str, code: int) -> None:
    job = start(launcher, act)
    ended, message = job.end()
    assert (ended, message.startswith(f"rank 1 was ended by {act}")) == (code, True), message
    assert not job.running()


@pytest.mark.parametrize(
    ("act", "code", "first_line"),
    [
        slow("vanish", 1, "rank 1 exited with code 0 before its work was done"),
        slow("config", 2, "data.sources=x is not there; name another"),
    ],
)
def test_other_ways_to_fail(start: Start, act: str, code: int, first_line: str) -> None:
    job = start("torchrun", act)
    ended, message = job.end()
    assert (ended, message.splitlines()[0]) == (code, first_line)
    assert not job.running()


@pytest.mark.slow
def test_trap_T34_a_failed_rank_ends_a_job_that_ignores_sigterm(start: Start) -> None:
    job = start("torchrun", "deaf")
    code, message = job.end()
    assert (code, message.splitlines()[0]) == (1, "rank 1 failed with ValueError: boom")
    assert not job.running()


@pytest.mark.parametrize("launcher", [slow(launcher) for launcher in LAUNCHERS])
def test_ctrl_c_ends_every_process_at_once(start: Start, launcher: str) -> None:
    job = start(launcher, "stray")
    assert len(job.running()) > 2 * WORKERS  # the job, its launcher, the workers, and their strays
    asked_s = time.monotonic()
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end() == (130, "stopped by SIGINT; every process has ended")
    assert time.monotonic() - asked_s < 5
    assert not job.running()


@pytest.mark.parametrize(
    ("launcher", "restarts", "signum"),
    [
        slow("deepspeed", 0, signal.SIGTERM),
        slow("torchrun", 0, signal.SIGUSR1),
        slow("torchrun", 3, signal.SIGTERM),
        ("mpirun", 0, signal.SIGUSR1),
    ],
)
def test_a_job_that_stops_on_request_exits_with_75(
    start: Start, launcher: str, restarts: int, signum: signal.Signals
) -> None:
    job = start(launcher, "stop", restarts)
    job.process.send_signal(signum)
    asked_s = time.monotonic()
    message = f"stopped on request ({signum.name}): every rank saved its checkpoint; start again to resume"
    assert job.end() == (75, message)
    assert time.monotonic() - asked_s < 5
    assert not job.running()
    for rank in range(WORKERS):
        lines = (job.run_dir / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert lines == [f"rank {rank} of {WORKERS} is up", f"received {signum.name}"]


@pytest.mark.slow
def test_a_worker_that_fails_while_it_stops_is_reported_and_not_restarted(start: Start) -> None:
    job = start("torchrun", "break", 3)
    job.process.send_signal(signal.SIGUSR1)
    code, message = job.end()
    assert (code, message.splitlines()[0]) == (1, "rank 1 failed with ValueError: the disk is full")
    assert not job.running()


@pytest.mark.slow
@pytest.mark.parametrize(("restarts", "signum"), [(0, signal.SIGUSR1), (3, signal.SIGTERM)])
def test_workers_that_cannot_stop_yet_die_from_the_signal(start: Start, restarts: int, signum: signal.Signals) -> None:
    job = start("torchrun", "wait", restarts)
    job.process.send_signal(signum)
    assert job.end() == (128 + signum, f"stopped by {signum.name}; every process has ended")
    assert not job.running()


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_workers_that_ignore_the_first(start: Start, second: signal.Signals) -> None:
    job = start("torchrun", "deaf alone")
    job.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(1)
    job.process.send_signal(second)
    assert job.end() == (128 + second, f"stopped by {second.name}; every process has ended")
    assert not job.running()


@pytest.mark.slow
def test_a_request_to_stop_before_the_workers_connect_ends_the_job(tmp_path: Path) -> None:
    job = Job("torchrun", "finish", write_config(tmp_path))
    while not (job.run_dir / "launch.lock").exists():
        assert job.process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # until it captures signals
    job.process.terminate()
    assert job.end() == (143, "stopped by SIGTERM; every process has ended")
    assert not job.running()


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker(start: Start) -> None:
    job = start("torchrun", "again", 1)
    assert job.end(START_LIMIT_S) == (0, "")
    log = (job.run_dir / "logs" / "rank-1.log").read_text()
    assert log == f"rank 1 of {WORKERS} is up\n" * 2
    assert not list(job.run_dir.glob("errors/*"))


@pytest.mark.slow
def test_the_last_attempt_is_reported(start: Start) -> None:
    job = start("torchrun", "raise", 1)
    code, message = job.end(START_LIMIT_S)
    assert (code, message.splitlines()[0]) == (1, "rank 1 failed with ValueError: boom")
    assert (job.run_dir / "logs" / "rank-1.log").read_text().count("is up\n") == 2


@pytest.mark.slow
def test_workers_do_not_outlive_a_launch_that_is_killed(start: Start) -> None:
    job = start("deepspeed", "wait")
    job.process.kill()
    deadline = time.monotonic() + END_LIMIT_S
    while job.running():
        assert time.monotonic() < deadline, job.running()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_job_in_the_same_folder_is_refused(start: Start, tmp_path: Path) -> None:
    first = start("torchrun", "wait")
    second = Job("torchrun", "finish", tmp_path / "run.yaml")
    assert second.process.wait(timeout=START_LIMIT_S) == 1
    assert f"run.dir={first.run_dir} is in use" in second.process.communicate()[1]
    assert first.process.poll() is None
