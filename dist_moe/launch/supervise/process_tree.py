"""The descendants of a process, and signals that never reach a later process with the same pid."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path
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
    """Return the children, grandchildren and so on of the process `root` by pid, zombies included.

    Processes that this user may not read, as those of others where /proc is mounted with hidepid, are none of them.
    """
    # Not `Process.children`: it omits children that started before their parent by the clock, which may be adjusted.
    children: dict[int, list[int]] = {}
    for pid in psutil.pids():
        children.setdefault(_parent(pid), []).append(pid)
    found: dict[int, Descendant] = {}
    pending = [root]
    while pending:
        parent = pending.pop()
        for pid in children.get(parent, []):
            entry = None if pid in found or pid == root else _child(pid, parent)
            if entry is not None:
                found[pid] = entry
                pending.append(pid)
    return found


def _child(pid: int, parent: int) -> Descendant | None:
    """Return the process `pid` if `parent` is still its parent: a pid may have been given to another process."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        with process.oneshot():
            entry = Descendant(process, process.ppid(), process.status() in ENDED)
        return entry if entry.parent == parent else None
    return None


def _parent(pid: int) -> int:
    """Return the pid of a process's parent; -1 where the process has ended, or cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return -1
    return int(stat.rpartition(b")")[2].split()[1])  # the name, in brackets, may contain spaces and brackets


def send_signal(process: psutil.Process, signum: signal.Signals) -> bool:
    """Send the signal to this process, or to none if it is gone; return False if this user may not send it.

    `psutil.Process.send_signal` compares the start time and then signals the pid, which may be reused in between; a
    pidfd that is opened before the comparison cannot.
    """
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if process.is_running():
            signal.pidfd_send_signal(handle, signum)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return True
    except (PermissionError, psutil.AccessDenied):
        return False
    finally:
        os.close(handle)
    return True


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
