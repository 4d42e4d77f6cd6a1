"""The descendants of a process, and signals that never reach a later process with the same pid."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import psutil

PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class Descendant(NamedTuple):
    """A process as it was when the tree was read.

    Attributes:
        process: psutil's handle, equal only to handles of the same process (pid and start time).
        parent: The pid of its parent.
        ended: The process has ended, and its parent has not waited for it yet.
    """

    process: psutil.Process
    parent: int
    ended: bool


def descendants(root: int) -> dict[int, Descendant]:
    """Return the children, grandchildren and so on of the process `root` by pid, zombies included."""
    # Not `Process.children`: it omits children that started before their parent by the clock, which may be adjusted.
    table: list[Descendant] = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            with process.oneshot():
                table.append(Descendant(process, process.ppid(), process.status() in ENDED))
    found: dict[int, Descendant] = {}
    parents = {root}
    while parents:
        children = {
            entry.process.pid: entry
            for entry in table
            if entry.parent in parents and entry.process.pid not in found and entry.process.pid != root
        }
        found |= children
        parents = set(children)
    return found


def send_signal(process: psutil.Process, signum: signal.Signals) -> None:
    """Send the signal to this process, or to none if it is gone.

    `psutil.Process.send_signal` compares the start time and then signals the pid, which may be reused in between; a
    pidfd that is opened before the comparison cannot.
    """
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(process.pid)
        try:
            if process.is_running():
                signal.pidfd_send_signal(handle, signum)
        finally:
            os.close(handle)


@contextlib.contextmanager
def adopt_orphans() -> Iterator[None]:
    """In the block, a descendant whose parent ends becomes a child of this process, not of init.

    So `descendants(os.getpid())` includes those in sessions of their own and those that detached themselves.
    (`prctl(2)`, PR_SET_CHILD_SUBREAPER.)

    Raises:
        OSError: The kernel refuses it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    previous = ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(previous), 0, 0, 0)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) was refused")
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, previous.value, 0, 0, 0)
