"""A launch that is asked to stop passes it on, and keeps what happens on the way apart from what came before."""

import signal
import time
from pathlib import Path

from dist_moe.launch.supervise.monitor import Hub
from dist_moe.launch.supervise.protocol import ready
from tests.unit.launch.monitored import LIMIT_S, greet, start, until


def test_a_signal_is_passed_on_and_a_worker_that_stops_has_not_failed(hub: Hub, tmp_path: Path) -> None:
    """The last act is that of a worker whose checkpoint is saved."""
    act = """
import signal
from dist_moe.worker.exit import write_record
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
print("listens", flush=True)
while not heard:
    time.sleep(0.01)
write_record(Path(sys.argv[2]), 0, "stopped", code=75)
sys.exit(75)
"""
    log = tmp_path / "logs" / "rank-0.log"
    first = start(hub, tmp_path, act)
    until(hub, lambda: log.is_file() and "listens" in log.read_text())
    assert not hub.stopped()
    hub.pass_on(signal.SIGUSR1)
    until(hub, hub.stopped)
    assert hub.unfinished() == hub.failures() == []
    first.communicate(timeout=LIMIT_S)
    assert first.returncode == 75


def test_a_worker_that_appears_after_the_signal_is_told_too(hub: Hub, tmp_path: Path) -> None:
    hub.pass_on(signal.SIGUSR1)
    worker = start(hub, tmp_path, "time.sleep(600)")
    until(hub, lambda: bool(hub.failures()))
    assert hub.failures()[0].code == 128 + signal.SIGUSR1
    worker.communicate(timeout=LIMIT_S)


def test_a_worker_that_a_launcher_ends_or_starts_again_after_a_stop_changes_nothing(hub: Hub) -> None:
    """Launchers take the code 75 of the first for a failure."""
    lines = [greet(hub, 0, 2), greet(hub, 1, 2)]
    until(hub, lambda: hub.size == 2 and hub.complete())
    lines[0].give({"ended": 75 << 8, "state": "stopped", "time": time.time()})
    until(hub, lambda: hub.unfinished() == [1])
    lines.append(greet(hub, 0, 2))
    lines[1].give({"ended": int(signal.SIGTERM), "state": "running", "time": time.time()})
    until(hub, hub.stopped)
    for line in lines:
        line.close()
    for _ in range(3):
        hub.wait(0.05)
        hub.look()
    assert hub.stopped() and hub.failures() == []


def test_a_failure_after_the_request_to_stop_stays_when_its_worker_is_started_again(hub: Hub) -> None:
    failed = greet(hub, 0, 1)
    until(hub, hub.complete)
    hub.pass_on(signal.SIGUSR1)
    failed.give({"ended": 3 << 8, "state": "running", "time": time.time()})
    until(hub, lambda: bool(hub.failures()))
    again = greet(hub, 0, 1)
    again.give({"ended": signal.SIGUSR1, "state": None, "time": time.time()})
    for _ in range(5):
        hub.wait(0.1)
        hub.look()
    assert [failure.code for failure in hub.failures()] == [3]
    assert not ready([again], 0)  # it was given no signal
    failed.close()
    again.close()
