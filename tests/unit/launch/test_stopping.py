"""A launch forwards requests to stop, and distinguishes what follows from them from failures."""

import signal
import time
from pathlib import Path

import pytest

from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import wait_readable
from tests.unit.launch.monitored import LIMIT_S, greet, start, until


def test_a_signal_is_forwarded_and_a_worker_that_stops_has_not_failed(monitor: WorkerMonitor, tmp_path: Path) -> None:
    """It exits as a worker does after it saved a checkpoint."""
    act = """
import signal
from dist_moe.worker.exit import write_record
received = []
signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
print("ready to stop", flush=True)
while not received:
    time.sleep(0.01)
write_record(Path(sys.argv[2]), 0, "stopped", code=75)
sys.exit(75)
"""
    log = tmp_path / "logs" / "rank-0.log"
    first = start(monitor, tmp_path, act)
    until(monitor, lambda: log.is_file() and "ready to stop" in log.read_text())
    assert not monitor.stopped()
    monitor.forward_signal(signal.SIGUSR1)
    until(monitor, monitor.stopped)
    assert monitor.unfinished() == monitor.failures() == []
    first.communicate(timeout=LIMIT_S)
    assert first.returncode == 75


def test_a_worker_that_connects_after_the_signal_receives_it(monitor: WorkerMonitor, tmp_path: Path) -> None:
    monitor.forward_signal(signal.SIGUSR1)
    worker = start(monitor, tmp_path, "time.sleep(600)")
    until(monitor, lambda: bool(monitor.failures()))
    assert monitor.failures()[0].code == 128 + signal.SIGUSR1
    worker.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize("monitor", [2], indirect=True)
def test_workers_that_a_launcher_ends_or_restarts_after_a_stop_are_ignored(monitor: WorkerMonitor) -> None:
    """Launchers take the exit code 75 of the first for a failure."""
    agents = [greet(monitor, 0, 2), greet(monitor, 1, 2)]
    until(monitor, lambda: monitor.size == 2 and monitor.all_connected())
    agents[0].send({"wait_status": 75 << 8, "state": "stopped", "time": time.time()})
    until(monitor, lambda: monitor.unfinished() == [1])
    agents.append(greet(monitor, 0, 2))
    agents[1].send({"wait_status": int(signal.SIGTERM), "state": "running", "time": time.time()})
    until(monitor, monitor.stopped)
    for agent in agents:
        agent.close()
    for _ in range(3):
        monitor.wait(0.05)
        monitor.poll()
    assert monitor.stopped() and monitor.failures() == []


def test_a_failure_after_a_request_to_stop_remains_when_its_worker_is_restarted(monitor: WorkerMonitor) -> None:
    failed = greet(monitor, 0, 1)
    until(monitor, monitor.all_connected)
    monitor.forward_signal(signal.SIGUSR1)
    failed.send({"wait_status": 3 << 8, "state": "running", "time": time.time()})
    until(monitor, lambda: bool(monitor.failures()))
    again = greet(monitor, 0, 1)
    again.send({"wait_status": signal.SIGUSR1, "state": None, "time": time.time()})
    for _ in range(5):
        monitor.wait(0.1)
        monitor.poll()
    assert [failure.code for failure in monitor.failures()] == [3]
    assert not wait_readable([again], 0)  # it got no signal
    failed.close()
    again.close()
