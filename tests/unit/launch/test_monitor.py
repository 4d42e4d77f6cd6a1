"""The connection between a launch and its workers' agents: real sockets, real processes, on this host."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import MAX_MESSAGE_BYTES, Rendezvous, wait_readable
from dist_moe.worker.contract import LAUNCH_VARIABLE
from tests.unit.launch.monitored import LIMIT_S, WORKER, greet, start, until


def test_a_finished_worker_is_recorded_and_its_output_has_its_rank(
    monitor: WorkerMonitor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act = """
from dist_moe.worker.exit import write_record
write_record(Path(sys.argv[2]), 0, "finished", code=0)
"""
    worker = start(monitor, tmp_path, act)
    until(monitor, lambda: not monitor.unfinished())
    assert (*worker.communicate(timeout=LIMIT_S), worker.returncode) == ("", "", 0)
    prefix = f"[0@{socket.gethostname()}] "
    assert capsys.readouterr() == (f"{prefix}hello\n", f"{prefix}oops\n")
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "hello\noops\n"
    assert monitor.failures() == []


@pytest.mark.parametrize(
    ("act", "code", "message"),
    [
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL (signal 9)"),
        ("sys.exit(3)", 3, "exited with code 3 and without an error report"),
        ("os._exit(0)", 1, "exited with code 0 before its work was done"),
    ],
)
def test_an_exit_without_a_report_is_described_with_rank_and_host(
    monitor: WorkerMonitor, tmp_path: Path, act: str, code: int, message: str
) -> None:
    worker = start(monitor, tmp_path, act)
    until(monitor, lambda: bool(monitor.failures()))
    (failure,) = monitor.failures()
    assert failure.code == code and failure.text.startswith(f"rank 0 on {socket.gethostname()} {message}")
    worker.communicate(timeout=LIMIT_S)
    assert worker.returncode == (code if message.startswith("was") or code == 3 else 0)


def test_an_error_report_is_received_before_the_exit(monitor: WorkerMonitor, tmp_path: Path) -> None:
    act = """
from dist_moe.worker.exit import report_failure
with report_failure(sys.argv[2], 0):
    raise ValueError("boom")
"""
    worker = start(monitor, tmp_path, act)
    until(monitor, lambda: bool(monitor.failures()))
    assert monitor.failures()[0].text.startswith(f"rank 0 on {socket.gethostname()} failed with ValueError: boom")
    worker.communicate(timeout=LIMIT_S)
    assert worker.returncode == 1


def test_messages_about_a_single_host_do_not_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act = """
from dist_moe.worker.exit import report_failure
with report_failure(sys.argv[2], 0):
    raise ValueError("boom")
"""
    with WorkerMonitor("127.0.0.1", 1, tmp_path, multi_host=False) as monitor:
        worker = start(monitor, tmp_path, act)
        until(monitor, lambda: bool(monitor.failures()))
        report = tmp_path / "errors" / "rank-0.txt"
        assert monitor.failures()[0].text == f"rank 0 failed with ValueError: boom\n(traceback: {report})"
        assert monitor.agent_pids() == {worker.pid}
        worker.communicate(timeout=LIMIT_S)
        monitor.clear_records()
        assert not report.exists()
    assert capsys.readouterr().out == "[rank 0] hello\n"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_worker_and_what_it_started_end_with_the_launch(monitor: WorkerMonitor, tmp_path: Path, deaf: bool) -> None:
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" if deaf else ""
    act = f"""
{ignore}
detached = subprocess.Popen(["sleep", "600"], start_new_session=True)
Path(sys.argv[2], "pid").write_text(str(detached.pid))
time.sleep(600)
"""
    worker = start(monitor, tmp_path, act)
    until(
        monitor,
        lambda: monitor.all_connected() and (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "",
    )
    started_s = time.monotonic()
    monitor.release_workers()
    assert time.monotonic() - started_s < 4
    worker.communicate(timeout=LIMIT_S)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_worker_does_not_outlive_its_agent(monitor: WorkerMonitor, tmp_path: Path) -> None:
    act = 'Path(sys.argv[2], "pid").write_text(str(os.getpid())); time.sleep(600)'
    worker = start(monitor, tmp_path, act)
    until(monitor, lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "")
    worker.send_signal(signal.SIGKILL)
    until(monitor, lambda: bool(monitor.failures()))
    assert "was lost: its host ended, or the network to it was cut" in monitor.failures()[0].text
    worker.communicate(timeout=LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while Path("/proc", (tmp_path / "pid").read_text()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_launcher_on_the_workers_host_ends_with_the_launch(monitor: WorkerMonitor, tmp_path: Path) -> None:
    """Also one that ignores SIGTERM: torchrun waits for minutes for a store that it cannot reach."""
    launcher = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run([sys.executable, "-c", {WORKER!r}, *sys.argv[1:]])
"""
    argv = [sys.executable, "-c", launcher, str(monitor.rendezvous), str(tmp_path), "time.sleep(600)"]
    process = subprocess.Popen(argv, env={**os.environ, LAUNCH_VARIABLE: str(monitor.rendezvous)})
    until(monitor, monitor.all_connected)
    monitor.release_workers()
    assert process.wait(timeout=LIMIT_S) == -signal.SIGKILL


def test_the_record_and_report_of_an_earlier_worker_are_removed(monitor: WorkerMonitor, tmp_path: Path) -> None:
    """The worker itself removes them only once it has started."""
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "rank-0.txt").write_text("time: 1\nrank: 0\n\nValueError: old\n")
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "rank-0.json").write_text('{"state": "finished"}')
    worker = start(monitor, tmp_path, "time.sleep(0.5); os._exit(0)")
    until(monitor, lambda: bool(monitor.failures()))
    assert "exited with code 0 before its work was done" in monitor.failures()[0].text
    worker.communicate(timeout=LIMIT_S)


def test_a_long_report_is_truncated_at_its_end(monitor: WorkerMonitor, tmp_path: Path) -> None:
    act = """
from dist_moe.worker.exit import report_failure
with report_failure(sys.argv[2], 0):
    raise ValueError("boom " + "x" * 300_000)
"""
    worker = start(monitor, tmp_path, act)
    until(monitor, lambda: bool(monitor.failures()))
    assert monitor.failures()[0].text.startswith(f"rank 0 on {socket.gethostname()} failed with ValueError: boom xxx")
    worker.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize("monitor", [2], indirect=True)
def test_a_job_that_continues_with_fewer_workers_is_monitored(monitor: WorkerMonitor) -> None:
    """Ranks that no longer exist are removed, and a worker whose rank another has now stays connected."""
    monitor.replaces_workers = True
    before = [greet(monitor, 0, 2), greet(monitor, 1, 2)]
    until(monitor, lambda: monitor.size == 2 and monitor.all_connected())
    before[1].close()
    until(monitor, lambda: bool(monitor.failures()))
    after = greet(monitor, 0, 1)
    until(monitor, lambda: monitor.size == 1 and not monitor.failures())
    assert monitor.all_connected() and monitor.unfinished() == [0]
    assert wait_readable([before[0]], 0.2) == []
    again = [greet(monitor, 0, 2), greet(monitor, 1, 2)]
    until(monitor, lambda: monitor.size == 2 and monitor.all_connected())
    last = greet(monitor, 0, 1)
    until(monitor, lambda: monitor.size == 1)
    again[1].close()
    for _ in range(3):
        monitor.wait(0.05)
        monitor.poll()
    assert monitor.failures() == []
    last.send({"wait_status": 0, "state": "finished"})
    until(monitor, lambda: not monitor.unfinished())
    for agent in (before[0], after, again[0], last):
        agent.close()


@pytest.mark.parametrize(
    "message",
    [
        b"\n",
        b"not json\n",
        b"[1]\n",
        b'{"token": "x", "rank": 0}\n',
        b'{"token": "\\u00e9", "rank": 0, "size": 1}\n',
        b'{"token": "\\ud800", "rank": 0, "size": 1}\n',
        b"[" * 60_000 + b"\n",
        b'{"token": "x"',
        b"a" * (MAX_MESSAGE_BYTES + 2),
    ],
)
def test_a_connection_without_a_valid_greeting_is_closed(monitor: WorkerMonitor, message: bytes) -> None:
    with socket.create_connection(monitor.rendezvous[:2], timeout=LIMIT_S) as stranger:
        stranger.sendall(message[: 1 << 16])
        for _ in range(5):
            monitor.wait(0.05)
            monitor.poll()
    monitor.poll()
    assert not monitor.all_connected() and monitor.failures() == []


def test_a_worker_that_cannot_reach_its_launch_exits_with_an_error(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        rendezvous = Rendezvous("127.0.0.1", closed.getsockname()[1], "token")
    argv = [sys.executable, "-c", WORKER, str(rendezvous), str(tmp_path), ""]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 1 and f"cannot reach the launch at 127.0.0.1, port {rendezvous.port}" in done.stderr


def test_the_report_of_a_running_worker_is_not_polled_for(monitor: WorkerMonitor, tmp_path: Path) -> None:
    """Shared storage may fail for a moment: a file is looked for once the worker says so, or has ended."""
    worker = start(monitor, tmp_path, "time.sleep(1.5); os._exit(0)")
    until(monitor, monitor.all_connected)
    (tmp_path / "errors").mkdir(exist_ok=True)
    (tmp_path / "errors" / "rank-0.txt").write_text("not of the worker")
    deadline = time.monotonic() + 0.7
    while time.monotonic() < deadline:
        monitor.wait(0.1)
        monitor.poll()
    assert monitor.failures() == []
    until(monitor, lambda: bool(monitor.failures()))
    worker.communicate(timeout=LIMIT_S)
