"""What the user's signals do to a job, and how long a job may take to end."""

import math
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.launch.command import Command
from dist_moe.launch.supervise import run_job
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import MessageSocket
from dist_moe.launch.supervise.run_job import JobEnd, ending_signal, grace_period_s, outcome_of, wait_for_end

COMMAND = Command("torchrun", (), {})


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[WorkerMonitor]:
    with WorkerMonitor("127.0.0.1", 1, tmp_path, multi_host=False) as opened:
        yield opened


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as sleeping:
        yield sleeping
        sleeping.kill()


def greet(monitor: WorkerMonitor) -> MessageSocket:
    """Connect and greet as the only worker's agent."""
    agent = MessageSocket(socket.create_connection(monitor.rendezvous[:2]))
    agent.send({"token": monitor.rendezvous.token, "rank": 0, "size": 1, "host": "host", "agent_pid": 0})
    while not monitor.all_connected():
        monitor.wait(0.1)
        monitor.poll()
    return agent


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        ([], None),
        ([signal.SIGUSR1], None),
        ([signal.SIGTERM], None),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1], None),
        ([signal.SIGTERM, signal.SIGTERM], signal.SIGTERM),
        ([signal.SIGINT], None),
        ([signal.SIGINT, signal.SIGINT], signal.SIGINT),
        ([signal.SIGINT, signal.SIGUSR1], None),
        ([signal.SIGINT, signal.SIGTERM], signal.SIGTERM),
        ([signal.SIGTERM, signal.SIGINT], signal.SIGINT),
        ([signal.SIGUSR1, signal.SIGINT], signal.SIGINT),
        ([signal.SIGHUP], signal.SIGHUP),
    ],
)
def test_ending_signal_is_none_for_requests_to_stop_alone(received: list[int], expected: int | None) -> None:
    assert ending_signal(received) == expected


def test_workers_that_ignore_a_request_to_stop_are_ended_after_the_timeout(
    monitor: WorkerMonitor, launcher: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_job, "STOP_TIMEOUT_S", 0.3)
    agent = greet(monitor)
    end = wait_for_end([launcher], monitor, [signal.SIGUSR1], restarts=False)
    assert agent.receive() == [{"signal": signal.SIGUSR1}]
    assert end == JobEnd(None, signal.SIGUSR1)
    assert outcome_of(COMMAND, end, monitor, [signal.SIGUSR1]).code == 128 + signal.SIGUSR1
    agent.close()


def test_a_request_to_stop_before_the_workers_connect_ends_the_job(
    monitor: WorkerMonitor, launcher: subprocess.Popen[bytes]
) -> None:
    assert wait_for_end([launcher], monitor, [signal.SIGTERM], restarts=False) == JobEnd(None, signal.SIGTERM)


def test_a_second_signal_shortens_every_wait_at_the_end(tmp_path: Path) -> None:
    """All of them together: the release of workers that do not answer, their last messages, and their output."""
    received: list[int] = []
    with WorkerMonitor("127.0.0.1", 1, tmp_path) as monitor:
        monitor.ends_by = run_job.HurriedEnd(received).ends_by
        agent = greet(monitor)
        began = time.monotonic()
        second = threading.Timer(0.3, received.extend, ([signal.SIGINT, signal.SIGINT],))
        second.start()
        monitor.release_workers()
        released_s = time.monotonic() - began
        monitor.drain(60.0)
        second.join()
    assert 0.3 + run_job.HURRIED_END_S <= released_s < 0.3 + run_job.HURRIED_END_S + 1.0
    assert time.monotonic() - began < released_s + 1.0
    agent.close()


def test_release_of_workers_is_not_shortened_by_a_first_signal(tmp_path: Path) -> None:
    with WorkerMonitor("127.0.0.1", 1, tmp_path) as monitor:
        monitor.ends_by = run_job.HurriedEnd([signal.SIGTERM]).ends_by
        agent = greet(monitor)
        began = time.monotonic()
        monitor.release_workers(0.3)
        assert time.monotonic() - began >= 0.3
    agent.close()


@pytest.mark.parametrize("restarts", [False, True])
def test_a_launcher_that_restarts_workers_gets_no_grace_period_after_a_stop(
    monitor: WorkerMonitor, restarts: bool
) -> None:
    agent = greet(monitor)
    assert grace_period_s(monitor, launcher_failed=False, restarts=restarts, stop_requested=True) == math.inf
    agent.send({"wait_status": 75 << 8, "state": "stopped", "time": time.time()})
    while not monitor.stopped():
        monitor.wait(0.1)
        monitor.poll()
    assert grace_period_s(monitor, launcher_failed=False, restarts=restarts, stop_requested=True) == (
        0 if restarts else run_job.LAUNCHER_GRACE_S
    )
    message = "stopped on request: every rank saved its checkpoint; start again to resume"
    assert outcome_of(COMMAND, JobEnd(75), monitor, []) == (75, message)
    agent.close()
