"""A launch that is asked to stop passes it on, and keeps what happens on the way apart from what came before."""

import signal
import time
from pathlib import Path

from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import ready
from tests.unit.launch.monitored import LIMIT_S, greet, start, until


def test_a_signal_is_passed_on_and_a_worker_that_stops_has_not_failed(monitor: WorkerMonitor, tmp_path: Path) -> None:
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
    first = start(monitor, tmp_path, act)
    until(monitor, lambda: log.is_file() and "listens" in log.read_text())
    assert not monitor.stopped()
    monitor.forward_signal(signal.SIGUSR1)
    until(monitor, monitor.stopped)
    assert monitor.unfinished() == monitor.failures() == []
    first.communicate(timeout=LIMIT_S)
    assert first.returncode == 75


def test_a_worker_that_appears_after_the_signal_is_told_too(monitor: WorkerMonitor, tmp_path: Path) -> None:
    monitor.forward_signal(signal.SIGUSR1)
    worker = start(monitor, tmp_path, "time.sleep(600)")
    until(monitor, lambda: bool(monitor.failures()))
    assert monitor.failures()[0].code == 128 + signal.SIGUSR1
    worker.communicate(timeout=LIMIT_S)


def test_a_worker_that_a_launcher_ends_or_starts_again_after_a_stop_changes_nothing(monitor: WorkerMonitor) -> None:
    """Launchers take the code 75 of the first for a failure."""
    lines = [greet(monitor, 0, 2), greet(monitor, 1, 2)]
    until(monitor, lambda: monitor.size == 2 and monitor.complete())
    lines[0].send({"ended": 75 << 8, "state": "stopped", "time": time.time()})
    until(monitor, lambda: monitor.unfinished() == [1])
    lines.append(greet(monitor, 0, 2))
    lines[1].send({"ended": int(signal.SIGTERM), "state": "running", "time": time.time()})
    until(monitor, monitor.stopped)
    for line in lines:
        line.close()
    for _ in range(3):
        monitor.wait(0.05)
        monitor.poll()
    assert monitor.stopped() and monitor.failures() == []


def test_a_failure_after_the_request_to_stop_stays_when_its_worker_is_started_again(monitor: WorkerMonitor) -> None:
    failed = greet(monitor, 0, 1)
    until(monitor, monitor.complete)
    monitor.forward_signal(signal.SIGUSR1)
    failed.send({"ended": 3 << 8, "state": "running", "time": time.time()})
    until(monitor, lambda: bool(monitor.failures()))
    again = greet(monitor, 0, 1)
    again.send({"ended": signal.SIGUSR1, "state": None, "time": time.time()})
    for _ in range(5):
        monitor.wait(0.1)
        monitor.poll()
    assert [failure.code for failure in monitor.failures()] == [3]
    assert not ready([again], 0)  # it was given no signal
    failed.close()
    again.close()
