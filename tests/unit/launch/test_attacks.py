"""What a worker gone wild can do to a launch: real sockets and processes."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_moe.launch.supervise import output
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import MessageSocket
from dist_moe.launch.supervise.pty import TerminalFilter
from dist_moe.launch.supervise.run_job import JobEnd, wait_for_end
from dist_moe.worker.contract import log_file
from tests.unit.launch.monitored import LIMIT_S, greet, until

ROOT = Path(__file__).resolve().parents[3]
SECOND = 1.0


@pytest.mark.parametrize(
    "record",
    [
        {"output": 3, "text": "x"},
        {"output": 1},
        {"output": 1, "text": ["x"]},
        {"terminal": 1},
        {"report": {}},
        {"wait_status": "0"},
        {"wait_status": 1 << 70},
        {"wait_status": 0x137F},
        {"wait_status": 0, "state": "happy"},
        {"wait_status": 0, "time": "now"},
        {"wait_status": 0, "time": float("nan")},
        {"wait_status": 0, "time": 10**400},
        {"wait_status": 0, "time": -(10**400)},
        {"wait_status": 10**400},
        {"output": 10**400, "text": "x"},
        {"output": "1", "terminal": "x"},
        {"output": 1, "text": "x", "wait_status": 10**400},
        {"unknown": 1},
        {},
    ],
)
def test_an_invalid_record_is_the_failure_of_its_worker_alone(monitor: WorkerMonitor, record: dict[str, Any]) -> None:
    agent = greet(monitor, 0, 1)
    until(monitor, monitor.all_connected)
    agent.send(record)
    until(monitor, lambda: bool(monitor.failures()))
    assert monitor.failures()[0].text.startswith("rank 0 on host of 0 in 1 sent ")
    agent.close()


@pytest.mark.parametrize(
    "report",
    [
        'time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 0\nexception: E\nmessage: "x"\n\n',
        'time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 999\nexception: E\nmessage: "x"\n\n',
        "time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 1\nexception: E\nmessage: 7\n\n",
        "time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 1\nexception: E\nmessage: " + "[" * 60_000 + "\n\n",
        "\x1b]0;owned\x07",
    ],
)
def test_an_invalid_report_is_quoted_in_plain_text(monitor: WorkerMonitor, report: str) -> None:
    agent = greet(monitor, 0, 1)
    until(monitor, monitor.all_connected)
    agent.send({"report": report})
    until(monitor, lambda: bool(monitor.failures()))
    text = monitor.failures()[0].text
    assert "failed with an invalid error report" in text and "\x1b" not in text
    assert monitor.failures()[0].code == 1
    agent.close()


def test_escapes_in_lines_hosts_logs_and_messages_are_shown_as_text(
    monitor: WorkerMonitor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202egnp"
    agent = MessageSocket(socket.create_connection(monitor.rendezvous[:2], timeout=LIMIT_S))
    agent.send({"token": monitor.rendezvous.token, "rank": 0, "size": 1, "host": f"a{evil}"})
    agent.send({"output": 1, "text": f"one{evil}\tтекст"})
    message = f'"boom {evil}"'.replace("\x1b", "\\u001b").replace("\x07", "\\u0007")
    agent.send({"report": f"time: 2026-01-01T00:00:00+00:00\nrank: 0\ncode: 1\nexception: E\nmessage: {message}\n\n"})
    until(monitor, lambda: bool(monitor.failures()))
    printed, log = capsys.readouterr().out, log_file(tmp_path, 0).read_text()
    for text in (printed, log, monitor.failures()[0].text):
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text), repr(text)
    assert "one\\x1b]52;c;ZXZpbA==\\x07\\x1b[2J" in log and "\tтекст" in log
    agent.close()


def test_the_terminal_of_rank_0_gets_colors_and_movements_but_no_other_escape() -> None:
    kept = "\x1b[?25l\x1b[31mone\x1b[0m\r\x1b[2K\x1b[1Atwo\n"
    evil = "\x1b]0;title\x07\x1b]52;c;eA==\x1b\\\x1bP1$r\x1b\\\x1b[6n\x1b[c\x1b[21t\x1b[?1049h\x1bc\x9b6n\x07\x0e"
    assert TerminalFilter().feed(kept + evil + "end") == kept + "end"
    parts = TerminalFilter()
    assert "".join(parts.feed(each) for each in kept + evil + "end") == kept + "end"
    endless = TerminalFilter()
    assert len("".join(endless.feed("\x1b]" + "x" * 10_000) for _ in range(10)) + endless._pending) <= 100_020


def test_a_worker_that_prints_without_end_does_not_make_the_launch_deaf(monitor: WorkerMonitor, tmp_path: Path) -> None:
    code = """
import json, socket, sys
from dist_moe.launch.supervise.protocol import MessageSocket, Rendezvous
rendezvous = Rendezvous.parse(sys.argv[1])
agent = MessageSocket(socket.create_connection(rendezvous[:2]))
agent.send({"token": rendezvous.token, "rank": 0, "size": 1, "host": "a"})
while agent.send({"output": 0, "text": "y\\n" * 30_000}):
    pass
"""
    with subprocess.Popen([sys.executable, "-c", code, str(monitor.rendezvous)]) as flood:
        until(monitor, monitor.all_connected)
        longest = 0.0
        end = time.monotonic() + SECOND
        while time.monotonic() < end:
            began = time.monotonic()
            monitor.poll()
            longest = max(longest, time.monotonic() - began)
        flood.kill()
    assert longest < SECOND


def test_a_log_is_bounded_and_says_so(monitor: WorkerMonitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "LOG_BYTES", 1000)
    for number in range(100):
        monitor.output.log(0, f"line {number:04}" + "." * 100 + "\n")
    path = log_file(tmp_path, 0)
    assert path.stat().st_size < 1200 and path.with_name("rank-0.log.1").stat().st_size < 1200
    assert sorted(each.name for each in path.parent.iterdir()) == ["rank-0.log", "rank-0.log.1"]
    assert path.read_text().startswith("[continues rank-0.log.1; a log has at most")
    assert "line 0099" in path.read_text() + path.with_name("rank-0.log.1").read_text()


NON_BLOCKING = """
import fcntl, os, sys
from dist_moe.launch.supervise.output import StreamWriter
fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)
writer = StreamWriter("stdout")
print("begin")
writer.write("".join(f"line {number:06}\\n" for number in range(100_000)))
writer.finish(30)
writer.write("last\\n")
writer.finish(30)
"""


def test_a_stdout_that_does_not_block_gets_every_line() -> None:
    """Another program that shares the pipe or terminal may have made it so."""
    argv = [sys.executable, "-c", NON_BLOCKING]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writing:
        assert writing.stdout
        time.sleep(0.5)
        lines = writing.stdout.read().splitlines()
    assert (writing.returncode, lines[0], lines[-1]) == (0, "begin", "last")
    assert lines[1:-1] == [f"line {number:06}" for number in range(100_000)]


def test_lines_that_are_dropped_last_are_counted_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "BUFFER_BYTES", 100_000)
    monkeypatch.setattr(output, "PATIENCE_S", 0.05)
    reading, writing = os.pipe()
    got: list[bytes] = []

    def read() -> None:
        while part := os.read(reading, 1 << 16):
            got.append(part)

    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        writer = output.StreamWriter("stdout")
        for _ in range(300):
            writer.write("x" * 999 + "\n")
        dropped = writer._dropped
        assert dropped > 100
        reader = threading.Thread(target=read)
        reader.start()
        writer.finish(LIMIT_S)
    reader.join()
    os.close(reading)
    lines = b"".join(got).decode().splitlines()
    note = f"[{dropped} lines are not shown: nothing read the output in time; see logs/ in run.dir]"
    assert (len(lines), lines[-1]) == (300 - dropped + 1, note)


UNREAD = """
import sys, time
from pathlib import Path
from dist_moe.launch.command import Command
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.run_job import run
worker = '''
import os, sys, time
from pathlib import Path
from dist_moe.launch.supervise.agent import fork_worker
from dist_moe.launch.supervise.protocol import Rendezvous
fork_worker(Rendezvous.parse(os.environ["DIST_MOE_LAUNCH"]), 0, 1, Path(sys.argv[1]))
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1], "up").touch()
while True:
    os.write(1, b"y" * 1000 + bytes([10]))
'''
command = Command("torchrun", (sys.executable, "-c", worker, sys.argv[1]), dict(__import__("os").environ))
with WorkerMonitor("127.0.0.1", 1, Path(sys.argv[1]), multi_host=False) as monitor:
    outcome = run(command, sys.argv[1], monitor)
sys.exit(outcome.code)
"""


def busy_s() -> float:
    """Seconds that half a second of work takes longer now than on cores that nothing else uses."""
    began, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.5:
        pass
    return max(0.0, time.monotonic() - began - 0.5)


def test_a_launch_whose_output_nobody_reads_obeys_ctrl_c(tmp_path: Path) -> None:
    """The first one asks the workers, of which this one ignores it; the second one ends them."""
    argv = [sys.executable, "-c", UNREAD, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launch:
        deadline = time.monotonic() + LIMIT_S
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)  # until the pipe is full
        launch.send_signal(signal.SIGINT)
        assert launch.stderr is not None
        began = time.monotonic()
        assert launch.stderr.readline().startswith(b"Ctrl-C: the workers finish their step")
        assert time.monotonic() - began < 2
        began = time.monotonic()
        launch.send_signal(signal.SIGINT)
        assert launch.wait(LIMIT_S) == 130
        # All waits have one deadline; what is left is work, which takes longer where other tests use the cores.
        assert time.monotonic() - began < 2 + busy_s(), "2 s on a host that does nothing else"


@pytest.mark.parametrize("monitor", [1000], indirect=True)
def test_a_thousand_workers(monitor: WorkerMonitor) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < 2500:
        pytest.skip(f"needs 2,500 open files, and ulimit -Hn is {hard}")
    agents = []
    for rank in range(1000):
        agents.append(greet(monitor, rank, 1000))
        if rank % 50 == 0:
            monitor.poll()
    until(monitor, monitor.all_connected)
    began = time.monotonic()
    monitor.forward_signal(signal.SIGTERM)
    assert time.monotonic() - began < SECOND
    for agent in agents:
        assert agent.receive() == [{"signal": signal.SIGTERM}]
        agent.send({"wait_status": 75 << 8, "state": "stopped"})
    began = time.monotonic()
    until(monitor, monitor.stopped)
    assert time.monotonic() - began < LIMIT_S / 2
    with subprocess.Popen(["sleep", "600"]) as launcher:
        began = time.monotonic()
        ended = threading.Timer(SECOND, launcher.kill)
        ended.start()
        assert wait_for_end([launcher], monitor, [], restarts=False) == JobEnd(-signal.SIGKILL)
        assert time.monotonic() - began < 5 * SECOND
    for agent in agents:
        agent.close()


@pytest.mark.parametrize("monitor", [4000], indirect=True)
def test_the_ranks_that_have_not_ended_are_found_in_linear_time(monitor: WorkerMonitor) -> None:
    monitor._finished, monitor._stopped = set(range(2000)), set(range(2000, 3999))
    began = time.process_time()
    assert monitor.unfinished() == [3999]
    assert time.process_time() - began < 0.05, "400 ms where the sets are joined for each rank"


def test_thousands_of_short_lines_are_one_write_to_the_log(
    monitor: WorkerMonitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log may be on shared storage, where each opening of a file takes a millisecond."""
    agent = greet(monitor, 0, 1)
    until(monitor, monitor.all_connected)
    writes: list[str] = []
    log = monitor.output.log

    def counting(rank: int, text: str) -> None:
        writes.append(text)
        log(rank, text)

    monkeypatch.setattr(monitor.output, "log", counting)
    agent.connection.sendall(b'{"output":1,"text":"x"}\n' * 20_000 + b'{"output":2,"text":"end"}\n')
    until(monitor, lambda: bool(writes) and writes[-1].endswith("end\n"))
    assert "".join(writes) == log_file(tmp_path, 0).read_text() == "x\n" * 20_000 + "end\n"
    assert len(writes) < 100
    printed = capsys.readouterr()
    assert (printed.out.count("\n"), printed.err) == (20_000, "[0@host of 0 in 1] end\n")
    agent.close()


HIDDEN = """
import os, subprocess, sys, time
from dist_moe.launch.supervise.process_tree import descendants
assert os.geteuid() != 0
try:
    open(f"/proc/{sys.argv[1]}/stat").read()
except PermissionError:
    pass
else:
    sys.exit("the process of root can be read")
child = subprocess.Popen(["sleep", "60"])
found = descendants(os.getpid())
child.kill()
assert list(found) == [child.pid], found
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts /proc, so it needs root")
def test_the_process_tree_where_proc_hides_other_users() -> None:
    other_user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    mount = f'mount -t proc -o hidepid=1 proc /proc && sleep 30 & sleep 1; {other_user} "$@" $!'
    inside = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", mount, "sh", sys.executable, "-c", HIDDEN]
    done = subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"this host refuses it: {done.stderr}")
    if "Permission denied" in done.stderr and "exec" in done.stderr:
        pytest.skip("another user cannot run this Python")
    assert done.returncode == 0, done.stderr
