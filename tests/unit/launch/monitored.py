"""Workers with minders, and minders without workers, for the tests of the launch's hub."""

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
from dist_moe.launch.supervise.agent import mind
from dist_moe.launch.supervise.protocol import Meeting
mind(Meeting.parse(sys.argv[1]), 0, 1, Path(sys.argv[2]))
print("hello", flush=True)
print("oops", file=sys.stderr, flush=True)
exec(sys.argv[3])
"""
LIMIT_S = 20.0


def start(monitor: WorkerMonitor, run_dir: Path, act: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", WORKER, str(monitor.rendezvous), str(run_dir), act]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def greet(monitor: WorkerMonitor, rank: int, size: int) -> MessageSocket:
    """The connection of a minder, without a worker."""
    line = MessageSocket(socket.create_connection(monitor.rendezvous[:2], timeout=LIMIT_S))
    line.send({"word": monitor.rendezvous.word, "rank": rank, "size": size, "host": f"host of {rank} in {size}"})
    return line


def until(monitor: WorkerMonitor, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        monitor.wait(0.1)
        monitor.poll()
