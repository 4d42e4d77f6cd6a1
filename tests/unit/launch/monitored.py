"""Workers with agents, and agents without workers, for the tests of the monitor."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.protocol import MessageSocket

WORKER = """
import os, subprocess, sys, time
from pathlib import Path
from dist_moe.launch.supervise.agent import fork_worker
from dist_moe.launch.supervise.protocol import Rendezvous
fork_worker(Rendezvous.parse(sys.argv[1]), 0, 1, Path(sys.argv[2]))
print("hello", flush=True)
print("oops", file=sys.stderr, flush=True)
exec(sys.argv[3])
"""
LIMIT_S = 20.0


def start(monitor: WorkerMonitor, run_dir: Path, act: str) -> subprocess.Popen[str]:
    """Start the only worker of a job, which runs the code `act`."""
    argv = [sys.executable, "-c", WORKER, str(monitor.rendezvous), str(run_dir), act]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def greet(monitor: WorkerMonitor, rank: int, size: int) -> MessageSocket:
    """Connect and greet as an agent would, without a worker."""
    agent = MessageSocket(socket.create_connection(monitor.rendezvous[:2], timeout=LIMIT_S))
    host = f"host of {rank} in {size}"
    agent.send({"token": monitor.rendezvous.token, "rank": rank, "size": size, "host": host})
    return agent


def until(monitor: WorkerMonitor, condition: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        monitor.wait(0.1)
        monitor.poll()
