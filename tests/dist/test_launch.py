"""Jobs under real launchers: how they end when all goes well, when a worker fails, and when asked to."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.selection import slow

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
WORKERS = 2
START_LIMIT_S = 120.0
END_LIMIT_S = 15.0
"""More than a job needs on a busy host, less than DeepSpeed, torchrun or gloo wait by themselves (30 s)."""

Start = Callable[..., "Job"]


class Job:
    """A running `launch_job` in a process group of its own, as under a shell, and all that carry its mark."""

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
        """Returns once every worker has met the others."""
        assert self.process.stdout
        up = 0
        while up < WORKERS:
            line = self.process.stdout.readline()
            assert line, f"the job ended first:\n{self.process.communicate()[1]}"
            up += line.endswith("is up\n")

    def end(self, limit_s: float = END_LIMIT_S) -> tuple[int, str]:
        """Waits for the end in good time -> exit code, and the message that the user sees."""
        _, errors = self.process.communicate(timeout=limit_s)
        assert "outcome: " in errors, errors
        return self.process.returncode, errors.partition("outcome: ")[2].strip()

    def left(self) -> list[str]:
        """The command lines of its processes that live, wherever they are."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if self.mark in (folder / "environ").read_text(errors="replace").split("\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # not a process, or one that ended meanwhile
                continue
        return found


def write_config(folder: Path) -> Path:
    """The debug run, in a folder of its own."""
    config = folder / "run.yaml"
    text = (ROOT / "configs" / "debug.yaml").read_text()
    config.write_text(text.replace("runs/debug", str(folder / "run")).replace("threads: auto", "threads: 1"))
    return config


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(launcher, act, restarts=0)` starts a job and waits until its workers are up; none outlives the test."""
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


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_good_job_ends_with_0_and_says_nothing(start: Start, launcher: str) -> None:
    job = start(launcher, "finish")
    assert job.end() == (0, "")
    assert not job.left()
    assert not list(job.run_dir.glob("errors/*"))


@pytest.mark.parametrize("launcher", ["deepspeed", slow("torchrun"), slow("mpirun")])
def test_the_first_rank_that_raises_is_named(start: Start, launcher: str) -> None:
    job = start(launcher, "raise")
    report = job.run_dir / "errors" / "rank-1.txt"
    told = f"rank 1 failed with ValueError: boom\n\nin two paragraphs\n(traceback: {report})"
    assert job.end() == (1, told)
    assert not job.left()
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
def test_a_rank_that_is_killed_is_named(start: Start, launcher: str, act: str, code: int) -> None:
    job = start(launcher, act)
    ended, told = job.end()
    assert (ended, told.startswith(f"rank 1 was ended by {act}")) == (code, True), told
    assert not job.left()


@pytest.mark.parametrize(
    ("act", "code", "told"),
    [
        slow("vanish", 1, "rank 1 ended with exit code 0 before its work was done"),
        slow("config", 2, "data.sources=x is not there; name another"),
    ],
)
def test_other_ways_to_fail(start: Start, act: str, code: int, told: str) -> None:
    job = start("torchrun", act)
    ended, message = job.end()
    assert (ended, message.splitlines()[0]) == (code, told)
    assert not job.left()


@pytest.mark.slow
def test_trap_T34_a_failed_rank_ends_a_job_that_hears_no_sigterm(start: Start) -> None:
    job = start("torchrun", "deaf")
    code, told = job.end()
    assert (code, told.splitlines()[0]) == (1, "rank 1 failed with ValueError: boom")
    assert not job.left()


@pytest.mark.parametrize("launcher", [slow(launcher) for launcher in LAUNCHERS])
def test_ctrl_c_ends_every_process_at_once(start: Start, launcher: str) -> None:
    job = start(launcher, "stray")
    assert len(job.left()) > 2 * WORKERS  # the job, its launcher, the workers, and their strays
    asked = time.monotonic()
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end() == (130, "stopped by SIGINT; every process has ended")
    assert time.monotonic() - asked < 5
    assert not job.left()


@pytest.mark.parametrize(
    ("launcher", "restarts", "signum"),
    [
        slow("deepspeed", 0, signal.SIGTERM),
        slow("torchrun", 0, signal.SIGUSR1),
        slow("torchrun", 3, signal.SIGTERM),
        ("mpirun", 0, signal.SIGUSR1),
    ],
)
def test_workers_that_are_told_to_stop_end_the_job_with_75(
    start: Start, launcher: str, restarts: int, signum: signal.Signals
) -> None:
    job = start(launcher, "heed", restarts)
    job.process.send_signal(signum)
    asked = time.monotonic()
    told = f"stopped on request ({signum.name}): every rank saved its checkpoint; start it again to go on"
    assert job.end() == (75, told)
    assert time.monotonic() - asked < 5
    assert not job.left()
    for rank in range(WORKERS):
        lines = (job.run_dir / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert lines == [f"rank {rank} of {WORKERS} is up", f"told {signum.name}"]


@pytest.mark.slow
def test_a_worker_that_fails_while_it_stops_is_named_and_not_started_again(start: Start) -> None:
    job = start("torchrun", "break", 3)
    job.process.send_signal(signal.SIGUSR1)
    code, told = job.end()
    assert (code, told.splitlines()[0]) == (1, "rank 1 failed with ValueError: the disk is full")
    assert not job.left()


@pytest.mark.slow
@pytest.mark.parametrize(("restarts", "signum"), [(0, signal.SIGUSR1), (3, signal.SIGTERM)])
def test_workers_that_cannot_stop_yet_end_by_the_signal(start: Start, restarts: int, signum: signal.Signals) -> None:
    job = start("torchrun", "stand", restarts)
    job.process.send_signal(signum)
    assert job.end() == (128 + signum, f"stopped by {signum.name}; every process has ended")
    assert not job.left()


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_workers_that_do_not_answer(start: Start, second: signal.Signals) -> None:
    job = start("torchrun", "deaf alone")
    job.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(1)
    job.process.send_signal(second)
    assert job.end() == (128 + second, f"stopped by {second.name}; every process has ended")
    assert not job.left()


@pytest.mark.slow
def test_a_request_to_stop_before_the_workers_are_there_ends_the_job(tmp_path: Path) -> None:
    job = Job("torchrun", "finish", write_config(tmp_path))
    while not (job.run_dir / "launch.lock").exists():
        assert job.process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # until it hears
    job.process.terminate()
    assert job.end() == (143, "stopped by SIGTERM; every process has ended")
    assert not job.left()


def test_a_killed_worker_is_started_again_by_torchrun(start: Start) -> None:
    job = start("torchrun", "again", 1)
    assert job.end(START_LIMIT_S) == (0, "")
    log = (job.run_dir / "logs" / "rank-1.log").read_text()
    assert log == f"rank 1 of {WORKERS} is up\n" * 2
    assert not list(job.run_dir.glob("errors/*"))


@pytest.mark.slow
def test_the_last_attempt_is_told(start: Start) -> None:
    job = start("torchrun", "raise", 1)
    code, told = job.end(START_LIMIT_S)
    assert (code, told.splitlines()[0]) == (1, "rank 1 failed with ValueError: boom")
    assert (job.run_dir / "logs" / "rank-1.log").read_text().count("is up\n") == 2


@pytest.mark.slow
def test_workers_do_not_outlive_a_launch_that_is_killed(start: Start) -> None:
    job = start("deepspeed", "stand")
    job.process.kill()
    deadline = time.monotonic() + END_LIMIT_S
    while job.left():
        assert time.monotonic() < deadline, job.left()
        time.sleep(0.05)


def test_a_second_job_in_the_same_folder_is_refused(start: Start, tmp_path: Path) -> None:
    first = start("torchrun", "stand")
    second = Job("torchrun", "finish", tmp_path / "run.yaml")
    assert second.process.wait(timeout=START_LIMIT_S) == 1
    assert f"run.dir={first.run_dir} is in use" in second.process.communicate()[1]
    assert first.process.poll() is None
