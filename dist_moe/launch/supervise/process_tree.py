"""The kernel's table of processes: who descends from whom, who has ended and how; and safe signals."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37


class Process(NamedTuple):
    """One line of the table.

    parent: its pid. start_time: clock ticks since the host started; with the pid it names one process for
    good. ended: it has ended, and its parent has not asked how. status: how, as `os.waitpid` gives it; 0
    before.
    """

    pid: int
    parent: int
    start_time: int
    ended: bool
    status: int


def read_process(pid: int) -> Process | None:
    """The process with this pid (fields 3, 4, 22 and 52 of /proc/PID/stat), or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return Process(pid, int(fields[1]), int(fields[19]), fields[0] in "ZX", int(fields[49]))


def descendants(root: int) -> dict[int, Process]:
    """Children, grandchildren and so on of the process `root`, by pid; those that have ended included."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    table = [process for process in map(read_process, pids) if process]
    found: dict[int, Process] = {}
    generation = {root}
    while generation:
        children = {p.pid: p for p in table if p.parent in generation and p.pid not in found}
        found |= children
        generation = set(children)
    return found


def send(process: Process, signum: signal.Signals) -> None:
    """Sends the signal to this very process, never to a later one that was given its pid."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(process.pid)
        try:
            now = read_process(process.pid)
            if now and now.start_time == process.start_time:
                signal.pidfd_send_signal(handle, signum)
        finally:
            os.close(handle)


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """In the block, a descendant whose parent ends becomes a child of this process, not of the system's first
    one.

    So `descendants(os.getpid())` has all of them: those in sessions of their own, and those that detached
    themselves. (`prctl(2)`, PR_SET_CHILD_SUBREAPER.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) was refused")
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
