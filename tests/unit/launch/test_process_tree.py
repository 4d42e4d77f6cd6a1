"""The process tree against real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from dist_moe.launch.supervise.process_tree import Descendant, adopt_orphans, descendants, send_signal

LIMIT_S = 30.0


def wait_for(condition: Callable[[], object]) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def new_descendants(known: set[int]) -> list[Descendant]:
    """The descendants of this process but the known ones."""
    return [entry for pid, entry in descendants(os.getpid()).items() if pid not in known]


def test_descendants_have_running_and_ended_processes_but_none_that_was_waited_for() -> None:
    child = subprocess.Popen(["sleep", "600"])
    running = descendants(os.getpid())[child.pid]
    assert (running.process.pid, running.parent, running.ended) == (child.pid, os.getpid(), False)
    child.kill()
    wait_for(lambda: descendants(os.getpid())[child.pid].ended)
    assert descendants(os.getpid())[child.pid].process == running.process
    child.wait()
    assert child.pid not in descendants(os.getpid())


def test_descendants_read_names_with_spaces_and_brackets() -> None:
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, b') Z 1 (x'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline()
        entry = descendants(os.getpid())[child.pid]
        child.kill()
    assert (entry.parent, entry.ended) == (os.getpid(), False)


def test_adopt_orphans_adopts_those_in_other_sessions() -> None:
    known = set(descendants(os.getpid()))  # of other tests, such as the pool of ranks
    with adopt_orphans():
        shell = subprocess.Popen(["/bin/sh", "-c", "setsid sleep 600 & exec true"])
        shell.wait()
        wait_for(lambda: [entry for entry in new_descendants(known) if entry.parent == os.getpid()])
        orphans = new_descendants({*known, shell.pid})
        for orphan in orphans:
            send_signal(orphan.process, signal.SIGKILL)
            os.waitpid(orphan.process.pid, 0)
    assert len(orphans) == 1


def test_descendants_have_grandchildren_and_no_parents() -> None:
    with subprocess.Popen(["/bin/sh", "-c", "sleep 600; true"], start_new_session=True) as shell:
        wait_for(lambda: descendants(shell.pid))
        tree = descendants(os.getpid())
        assert shell.pid in tree
        assert set(descendants(shell.pid)) < set(tree)
        assert os.getpid() not in tree
        os.killpg(shell.pid, signal.SIGKILL)


def test_send_signal_never_reaches_a_later_process_with_the_same_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["sleep", "600"])
    process = psutil.Process(ended.pid)
    time.sleep(0.05)  # more than a clock tick, by which start times differ
    later = subprocess.Popen(["sleep", "600"])
    ended.kill()
    ended.wait()
    # As if the kernel had given the pid away again: the pid of the later process, the start time of the ended one.
    monkeypatch.setattr(process, "_pid", later.pid)
    monkeypatch.setattr(process, "_ident", (later.pid, process._ident[1]))
    send_signal(process, signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        later.wait(timeout=0.3)
    send_signal(psutil.Process(later.pid), signal.SIGKILL)
    assert later.wait(timeout=LIMIT_S) == -signal.SIGKILL


def test_send_signal_ignores_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["sleep", "600"])
    process = psutil.Process(child.pid)
    child.kill()
    child.wait()
    send_signal(process, signal.SIGKILL)
    assert not process.is_running()
