"""Who is named as the first to fail, from the files and the ends of real processes."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.comm import failure
from dist_moe.launch import process
from dist_moe.launch.processes import read_process
from dist_moe.launch.watch import Watch, silent_end

LIMIT_S = 30.0


class Workers:
    """Processes that stand for workers: each is recorded as one, and reports what it is told to."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.processes: list[subprocess.Popen[bytes]] = []

    def add(self, seconds: float = 600) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(["sleep", str(seconds)])
        self.processes.append(worker)
        self.record("running", len(self.processes) - 1)
        return worker

    def record(self, state: str, rank: int) -> None:
        known = read_process(self.processes[rank].pid)
        assert known
        fields = {
            "rank": rank,
            "pid": known.pid,
            "start_time": known.start_time,
            "state": state,
            "code": None,
        }
        path = self.run_dir / "workers" / f"rank-{rank}.json"
        failure.write_atomically(path, json.dumps(fields))

    def report(self, rank: int, error: Exception, code: int = 1) -> None:
        text = failure.error_report(rank, error, code, "Traceback\n")
        failure.write_atomically(failure.error_file(self.run_dir, rank), text)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path)
    yield made
    for worker in made.processes:
        worker.kill()
        worker.wait()


@pytest.fixture
def watch(tmp_path: Path, workers: Workers) -> Iterator[Watch]:
    made = Watch(tmp_path, 2)
    yield made
    made.close()


def look_until_dead(watch: Watch, rank: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while rank not in watch.deaths:
        assert time.monotonic() < deadline
        watch.wait(0.05)
        watch.look()


def test_nothing_is_wrong_with_workers_that_live(workers: Workers, watch: Watch) -> None:
    workers.add()
    watch.look()
    assert watch.failures() == []
    assert watch.unfinished() == [0, 1]  # rank 1 has not even appeared
    assert watch.pids() == {workers.processes[0].pid}
    assert not watch.complete()


def kernel_remembers() -> bool:
    """Whether this kernel tells how a process ended after its parent has asked (Linux 6.15)."""
    release = os.uname().release.split("-")[0].split(".")
    return (int(release[0]), int(release[1])) >= (6, 15)


@pytest.mark.parametrize("collected", [False, True])
def test_a_silent_end_is_noticed(workers: Workers, watch: Watch, collected: bool) -> None:
    worker = workers.add()
    watch.look()
    worker.kill()
    if collected:  # as by a launcher that asks before we look
        worker.wait()
    look_until_dead(watch, 0)
    (only,) = watch.failures()
    known = kernel_remembers() or not collected
    told = "was ended by SIGKILL (signal 9)" if known else "ended without a report"
    assert only.text.startswith(f"rank 0 {told}")
    assert only.code == (137 if known else 1)


def test_wait_returns_as_soon_as_a_worker_ends(workers: Workers, watch: Watch) -> None:
    worker = workers.add()
    watch.look()
    worker.kill()
    before = time.monotonic()
    watch.wait(LIMIT_S)
    assert time.monotonic() - before < LIMIT_S / 2


def test_a_finished_worker_that_is_gone_has_not_failed(workers: Workers, watch: Watch) -> None:
    worker = workers.add(seconds=0.5)
    watch.look()
    workers.record("finished", 0)
    worker.wait()
    look_until_dead(watch, 0)
    assert watch.failures() == []
    assert watch.unfinished() == [1]


def test_the_earlier_report_is_named(workers: Workers, watch: Watch) -> None:
    workers.report(1, ValueError("first: a\n\nb"), code=7)
    workers.report(0, KeyError("second"))
    first, second = watch.failures()
    assert (first.rank, first.code, second.rank) == (1, 7, 0)
    assert first.text.startswith("rank 1 failed with ValueError: first: a\n\nb\n(traceback: ")


def test_a_lost_connection_is_not_named_where_its_cause_is_known(workers: Workers, watch: Watch) -> None:
    workers.report(0, RuntimeError("Read error [127.0.0.1]:49368: Connection reset by peer."))
    assert [failure.rank for failure in watch.failures()] == [0]
    workers.report(1, ValueError("the cause, and late"))
    assert [failure.rank for failure in watch.failures()] == [1, 0]


def test_a_kill_is_named_before_an_error_that_was_seen_a_little_earlier(workers: Workers, watch: Watch) -> None:
    workers.add()
    killed = workers.add()
    watch.look()
    workers.report(0, RuntimeError("NCCL operation failed"))
    killed.kill()
    look_until_dead(watch, 1)
    assert [failure.rank for failure in watch.failures()] == [1, 0]


def test_a_worker_that_a_launcher_ended_is_not_named(workers: Workers, watch: Watch) -> None:
    workers.add()
    told_to_end = workers.add()
    watch.look()
    workers.report(0, ValueError("boom"))
    told_to_end.terminate()
    look_until_dead(watch, 1)
    assert [failure.rank for failure in watch.failures()] == [0, 1]


def test_an_earlier_run_is_forgotten(workers: Workers, watch: Watch) -> None:
    workers.add()
    workers.report(0, ValueError("boom"))
    watch.clear()
    watch.look()
    assert watch.failures() == []
    assert watch.pids() == set()


def test_a_later_process_of_the_same_pid_is_not_taken_for_the_worker(workers: Workers, watch: Watch) -> None:
    worker = workers.add()
    path = workers.run_dir / "workers" / "rank-0.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "start_time": fields["start_time"] - 1}))
    watch.look()
    assert worker.poll() is None
    assert [failure.rank for failure in watch.failures()] == [0]


@pytest.mark.parametrize(
    ("code", "finished", "expected"),
    [
        (0, True, 0),
        (0, False, 1),
        (None, True, 0),
        (None, False, 1),
        (5, True, 5),
        (5, False, 5),
        (-signal.SIGSEGV, True, 139),
        (-signal.SIGRTMIN - 3, False, 128 + signal.SIGRTMIN + 3),
    ],
)
def test_exit_codes_of_silent_ends(code: int | None, finished: bool, expected: int) -> None:
    assert silent_end(0.0, 3, code, finished).code == expected


def test_both_sides_mean_the_same_variable_and_the_same_process() -> None:
    me = read_process(os.getpid())
    assert me
    assert process.LAUNCH_VARIABLE == failure.LAUNCH_VARIABLE
    assert failure.start_time(os.getpid()) == me.start_time
