"""Workers with minders, and minders without workers, for the tests of the launch's hub."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dist_moe.launch.supervise.monitor import Hub
from dist_moe.launch.supervise.protocol import Line

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


def start(hub: Hub, run_dir: Path, act: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", WORKER, str(hub.meeting), str(run_dir), act]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def greet(hub: Hub, rank: int, size: int) -> Line:
    """The connection of a minder, without a worker."""
    line = Line(socket.create_connection(hub.meeting[:2], timeout=LIMIT_S))
    line.give({"word": hub.meeting.word, "rank": rank, "size": size, "host": f"host of {rank} in {size}"})
    return line


def until(hub: Hub, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        hub.wait(0.1)
        hub.look()
