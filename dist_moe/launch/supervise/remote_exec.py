"""Runs a command on another host until its stdin closes: called by ssh, it ends when the launch does.

The first line of stdin is a JSON object with variables for the command, among them secrets: unlike the argument lists
of ssh and of this process, stdin cannot be read by other users.

An ssh server lets a command run on when its connection ends. A launcher may then wait for minutes for hosts that it
will not reach; the workers of one that got further are ended by their agents.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import psutil

from dist_moe.errors import UserError
from dist_moe.launch.supervise.process_tree import adopt_orphans, descendants, send_signal

GRACE_S = 3.0
POLL_S = 0.02
READ_BYTES = 1 << 16
MAX_VARIABLES_BYTES = 1 << 20
CLOSED_CODE = 1


def variables_line(variables: Mapping[str, str]) -> bytes:
    """Return the line by which variables are sent to a process on another host: argument lists are public.

    Raises:
        UserError: There are more than `read_variables` takes.
    """
    line = json.dumps(dict(variables)).encode() + b"\n"
    if len(line) > MAX_VARIABLES_BYTES:
        raise UserError(
            f"the variables of the workers have {len(line):,} bytes, of at most {MAX_VARIABLES_BYTES:,}; shorten "
            f"cluster.environment ({', '.join(sorted(variables, key=lambda name: -len(variables[name]))[:3])})"
        )
    return line


def pipe_size(line: bytes) -> int:
    """Return the `pipesize` of a process with which sending the line does not wait until it is read; -1: as it is."""
    return -1 if len(line) <= select.PIPE_BUF else MAX_VARIABLES_BYTES


def send_line(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Send the first line of stdin; where the process has ended, its exit code is reported later."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(line)
        process.stdin.flush()


def read_variables() -> dict[str, str]:
    """Read the first line of stdin, and no byte more; exit where stdin is closed before.

    Raises:
        ValueError: It is not an object of texts.
    """
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_VARIABLES_BYTES:
        if not (byte := os.read(sys.stdin.fileno(), 1)):
            sys.exit(CLOSED_CODE)
        line += byte
    variables = json.loads(line)
    if not (isinstance(variables, dict) and all(isinstance(value, str) for value in variables.values())):
        raise ValueError("the first line of stdin is not an object of variables")
    return variables


def run_until_stdin_closes(argv: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run a command until it ends or stdin is closed, and end everything that it started.

    After SIGTERM a process has 3 s until SIGKILL.

    Returns:
        The exit code of the command, or 128 + N after signal N.
    """
    environment = {**os.environ, **variables}
    with adopt_orphans(), subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=environment) as child:
        handle = os.pidfd_open(child.pid)
        while sys.stdin in select.select([handle, sys.stdin], [], [])[0] and child.poll() is None:
            if not os.read(sys.stdin.fileno(), READ_BYTES):
                _signal_descendants(signal.SIGTERM, GRACE_S)
                break
        _signal_descendants(signal.SIGKILL, GRACE_S)
        code = child.wait()
    return code if code >= 0 else 128 - code


def _signal_descendants(signum: signal.Signals, timeout_s: float) -> None:
    """Signal every descendant once, new ones included, until none is left or the time is over."""
    signaled: set[psutil.Process] = set()
    deadline = time.monotonic() + timeout_s
    while running := [entry.process for entry in descendants(os.getpid()).values() if not entry.ended]:
        for process in running:
            if process not in signaled:
                signaled.add(process)
                send_signal(process, signum)
        if time.monotonic() > deadline:
            return
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(run_until_stdin_closes(sys.argv[1:], read_variables()))
