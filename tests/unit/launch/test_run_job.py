"""What the user's signals do to a job, and how long one is waited for."""

import math
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.launch.command import Command
from dist_moe.launch.supervise import run_job
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import MessageSocket
from dist_moe.launch.supervise.run_job import End, ends_at_once, follow, grace_s, verdict

COMMAND = Command("torchrun", (), {})


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[WorkerMonitor]:
    with WorkerMonitor("127.0.0.1", 1, tmp_path, apart=False) as opened:
        yield opened


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as sleeping:
        yield sleeping
        sleeping.kill()


def greet(monitor: WorkerMonitor) -> MessageSocket:
    """The only worker's minder."""
    line = MessageSocket(socket.create_connection(monitor.rendezvous[:2]))
    line.send({"word": monitor.rendezvous.word, "rank": 0, "size": 1, "host": "host", "minder": 0})
    while not monitor.complete():
        monitor.wait(0.1)
        monitor.poll()
    return line


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        ([], None),
        ([signal.SIGUSR1], None),
        ([signal.SIGTERM], None),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1], None),
        ([signal.SIGTERM, signal.SIGTERM], signal.SIGTERM),
        ([signal.SIGUSR1, signal.SIGINT], signal.SIGINT),
        ([signal.SIGHUP], signal.SIGHUP),
    ],
)
def test_only_a_first_request_lets_the_job_go_on(received: list[int], expected: int | None) -> None:
    assert ends_at_once(received) == expected


def test_workers_that_do_not_answer_a_request_are_not_waited_for_without_end(
    monitor: WorkerMonitor, launcher: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_job, "STOP_LIMIT_S", 0.3)
    line = greet(monitor)
    end = follow([launcher], monitor, [signal.SIGUSR1], restarts=False)
    assert line.receive() == [{"signal": signal.SIGUSR1}]
    assert end == End(None, signal.SIGUSR1)
    assert verdict(COMMAND, end, monitor, [signal.SIGUSR1]).code == 128 + signal.SIGUSR1
    line.close()


def test_a_request_before_the_workers_are_there_ends_the_job(
    monitor: WorkerMonitor, launcher: subprocess.Popen[bytes]
) -> None:
    assert follow([launcher], monitor, [signal.SIGTERM], restarts=False) == End(None, signal.SIGTERM)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_launcher_that_restarts_workers_is_left_no_time_to_do_so_after_a_stop(
    monitor: WorkerMonitor, restarts: bool
) -> None:
    line = greet(monitor)
    assert grace_s(monitor, failed=False, restarts=restarts, asked=True) == math.inf
    line.send({"ended": 75 << 8, "state": "stopped", "time": time.time()})
    while not monitor.stopped():
        monitor.wait(0.1)
        monitor.poll()
    assert grace_s(monitor, failed=False, restarts=restarts, asked=True) == (
        0 if restarts else run_job.LAUNCHER_GRACE_S
    )
    told = "stopped on request: every rank saved its checkpoint; start it again to go on"
    assert verdict(COMMAND, End(75), monitor, []) == (75, told)
    line.close()
