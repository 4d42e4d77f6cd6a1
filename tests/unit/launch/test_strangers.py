"""What strangers, and a thief of the token, can do to a launch: real sockets and processes."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_moe.launch.supervise import listener
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import MessageSocket, wait_readable
from tests.unit.launch.monitored import LIMIT_S, greet, until


def poll_for(monitor: WorkerMonitor, seconds: float) -> None:
    """Poll for some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        monitor.wait(0.05)
        monitor.poll()


def connections(count: int, monitor: WorkerMonitor) -> list[socket.socket]:
    """Connect and say nothing."""
    return [socket.create_connection(monitor.rendezvous[:2], timeout=LIMIT_S) for _ in range(count)]


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection."""
    return bool(wait_readable([connection], 0)) and connection.recv(1) == b""


def test_strangers_are_bounded_in_number_and_time_and_a_worker_still_gets_in(
    monitor: WorkerMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MAX_STRANGERS", 16)
    monkeypatch.setattr(listener, "GREETING_LIMIT_S", 0.5)
    strangers = connections(100, monitor)
    agent = greet(monitor, 0, 1)
    held = 0
    deadline = time.monotonic() + LIMIT_S
    while not monitor.all_connected():
        assert time.monotonic() < deadline
        monitor.wait(0.05)
        monitor.poll()
        held = max(held, len(monitor._listener.sources()))
    assert held <= 17
    poll_for(monitor, 1.0)
    assert all(is_closed(stranger) for stranger in strangers)
    for stranger in strangers:
        stranger.close()
    agent.close()


def test_a_stranger_cannot_send_more_than_a_greeting(monitor: WorkerMonitor) -> None:
    (stranger,) = connections(1, monitor)
    until(monitor, lambda: len(monitor._listener._strangers) == 1)
    stranger.sendall(b"x" * 5000)
    until(monitor, lambda: not monitor._listener._strangers)
    assert is_closed(stranger)
    stranger.close()


FEW_FILES = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from dist_moe.launch.supervise.monitor import WorkerMonitor
with WorkerMonitor("127.0.0.1", 1, Path(sys.argv[1])) as monitor:
    print(monitor.rendezvous, flush=True)
    while not monitor.all_connected():
        monitor.wait(0.1)
        monitor.poll()
print("connected", flush=True)
"""


def test_a_launch_without_a_free_file_descriptor_goes_on(tmp_path: Path) -> None:
    from dist_moe.launch.supervise.protocol import Rendezvous

    argv = [sys.executable, "-c", FEW_FILES, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launch:
        assert launch.stdout and launch.stderr
        rendezvous = Rendezvous.parse(launch.stdout.readline().strip())
        strangers = [socket.create_connection(rendezvous[:2]) for _ in range(100)]
        agent = MessageSocket(socket.create_connection(rendezvous[:2]))
        agent.send({"token": rendezvous.token, "rank": 0, "size": 1, "host": "a"})
        assert launch.stdout.readline() == "connected\n"
        assert launch.wait(LIMIT_S) == 0
        assert "ulimit -n 40 is few for 1 worker, which needs about 258; raise the hard limit" in launch.stderr.read()
    for stranger in strangers:
        stranger.close()
    agent.close()


@pytest.mark.parametrize(("soft", "workers", "expected"), [(64, 2, 260), (64, 100, 456), (700, 100, 700)])
def test_the_soft_limit_of_open_files_is_raised_to_what_is_needed(soft: int, workers: int, expected: int) -> None:
    """Not to the hard limit, which is 10^9 in some containers: a child may close every descriptor below it."""
    code = f"""
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, hard))
from dist_moe.launch.supervise.listener import raise_file_limit
assert raise_file_limit({workers}) == ""
assert resource.getrlimit(resource.RLIMIT_NOFILE) == ({expected}, hard)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)


STRANGER = """
import socket, sys, time
held = []
print("started", flush=True)
while True:
    stranger = socket.socket()
    stranger.setblocking(False)
    stranger.connect_ex(("127.0.0.1", int(sys.argv[1])))
    held.append(stranger)
    if len(held) > 800:
        held.pop(0).close()
    time.sleep(0.0005)
"""
AGENTS = 64
CONNECTING = """
import sys, threading
from dist_moe.launch.supervise.agent import connect
from dist_moe.launch.supervise.protocol import Rendezvous
rendezvous, agents, count = Rendezvous.parse(sys.argv[1]), [], int(sys.argv[2])
def work(rank):
    agents.append(connect(rendezvous, {"rank": rank, "size": count, "host": "a"}))
threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
threading.Event().wait()
"""


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill a process at the end of the block."""
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("monitor", [AGENTS], indirect=True)
def test_strangers_who_connect_without_end_keep_no_agent_out(monitor: WorkerMonitor) -> None:
    attack = [sys.executable, "-c", STRANGER, str(monitor.rendezvous.port)]
    connecting = [sys.executable, "-c", CONNECTING, str(monitor.rendezvous), str(AGENTS)]
    with ended(subprocess.Popen(attack, stdout=subprocess.PIPE)) as stranger:
        assert stranger.stdout and stranger.stdout.readline() == b"started\n"
        until(monitor, lambda: len(monitor._listener._strangers) == listener.MAX_STRANGERS)
        with ended(subprocess.Popen(connecting)) as agents:
            until(monitor, monitor.all_connected)
            poll_for(monitor, 0.5)
            assert (len(monitor._agents), monitor.failures()) == (AGENTS, [])
            assert (stranger.poll(), agents.poll()) == (None, None)
    assert len(monitor._listener._strangers) <= listener.MAX_STRANGERS


@pytest.mark.parametrize("monitor", [2], indirect=True)
@pytest.mark.parametrize(
    "greeting",
    [
        {"rank": 1, "size": 2},
        {"rank": 1, "size": 2, "host": 7},
        {"rank": 1, "size": 2, "host": "a" * 300},
        {"rank": True, "size": 2, "host": "a"},
        {"rank": 1, "size": 2, "host": "a", "agent_pid": "1"},
        {"rank": -1, "size": 2, "host": "a"},
        {"rank": 0, "size": 1, "host": "a"},
        {"rank": 1, "size": 1 << 40, "host": "a"},
        {"rank": 0, "size": 2, "host": "thief"},
    ],
)
def test_who_has_the_token_cannot_resize_the_job_or_take_a_rank(
    monitor: WorkerMonitor, greeting: dict[str, Any]
) -> None:
    agent = greet(monitor, 0, 2)
    until(monitor, lambda: 0 in monitor._greetings)
    thief = MessageSocket(socket.create_connection(monitor.rendezvous[:2], timeout=LIMIT_S))
    thief.send({"token": monitor.rendezvous.token, **greeting})
    poll_for(monitor, 0.3)
    assert is_closed(thief.connection)
    assert (monitor.size, monitor.failures(), set(monitor._greetings)) == (2, [], {0})
    assert monitor.describe_rank(0) == "rank 0 on host of 0 in 2"
    agent.send({"wait_status": 0, "state": "finished"})
    until(monitor, lambda: monitor.unfinished() == [1])
    agent.close()
    thief.close()
