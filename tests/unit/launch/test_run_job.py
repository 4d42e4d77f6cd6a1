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
from dist_moe.launch.supervise.monitor import Hub
from dist_moe.launch.supervise.protocol import Line
from dist_moe.launch.supervise.run_job import End, ends_at_once, follow, grace_s, verdict

COMMAND = Command("torchrun", (), {})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub("127.0.0.1", 1, tmp_path, apart=False) as opened:
        yield opened


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as sleeping:
        yield sleeping
        sleeping.kill()


def greet(hub: Hub) -> Line:
    """The only worker's minder."""
    line = Line(socket.create_connection(hub.meeting[:2]))
    line.give({"word": hub.meeting.word, "rank": 0, "size": 1, "host": "host", "minder": 0})
    while not hub.complete():
        hub.wait(0.1)
        hub.look()
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
    hub: Hub, launcher: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_job, "STOP_LIMIT_S", 0.3)
    line = greet(hub)
    end = follow([launcher], hub, [signal.SIGUSR1], restarts=False)
    assert line.take() == [{"signal": signal.SIGUSR1}]
    assert end == End(None, signal.SIGUSR1)
    assert verdict(COMMAND, end, hub, [signal.SIGUSR1]).code == 128 + signal.SIGUSR1
    line.close()


def test_a_request_before_the_workers_are_there_ends_the_job(hub: Hub, launcher: subprocess.Popen[bytes]) -> None:
    assert follow([launcher], hub, [signal.SIGTERM], restarts=False) == End(None, signal.SIGTERM)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_launcher_that_restarts_workers_is_left_no_time_to_do_so_after_a_stop(hub: Hub, restarts: bool) -> None:
    line = greet(hub)
    assert grace_s(hub, failed=False, restarts=restarts, asked=True) == math.inf
    line.give({"ended": 75 << 8, "state": "stopped", "time": time.time()})
    while not hub.stopped():
        hub.wait(0.1)
        hub.look()
    assert grace_s(hub, failed=False, restarts=restarts, asked=True) == (0 if restarts else run_job.LAUNCHER_GRACE_S)
    told = "stopped on request: every rank saved its checkpoint; start it again to go on"
    assert verdict(COMMAND, End(75), hub, []) == (75, told)
    line.close()
