"""The table of processes against real ones."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from dist_moe.launch.supervise.process_tree import Process, adopting_orphans, descendants, read_process, send

LIMIT_S = 30.0


def wait_for(condition: Callable[[], object]) -> None:
    """Returns once the condition holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def newcomers(others: set[int]) -> list[Process]:
    """The descendants of this process, but for `others`."""
    return [process for pid, process in descendants(os.getpid()).items() if pid not in others]


def test_a_process_is_read_while_it_lives_after_it_ended_and_when_it_is_gone() -> None:
    child = subprocess.Popen(["sleep", "600"])
    living = read_process(child.pid)
    assert living
    assert (living.pid, living.parent, living.ended) == (child.pid, os.getpid(), False)
    child.kill()
    wait_for(lambda: read_process(child.pid).ended)  # type: ignore[union-attr]
    dead = read_process(child.pid)
    assert dead
    assert os.waitstatus_to_exitcode(dead.status) == -signal.SIGKILL
    assert dead.start_time == living.start_time
    child.wait()
    assert read_process(child.pid) is None


def test_a_name_with_spaces_and_brackets_is_no_obstacle() -> None:
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, b') Z 1 (x'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline()
        process = read_process(child.pid)
        child.kill()
    assert process
    assert (process.parent, process.ended) == (os.getpid(), False)


def test_descendants_have_the_orphans_in_other_sessions_too() -> None:
    others = set(descendants(os.getpid()))  # of other tests, such as the pool of ranks
    with adopting_orphans():
        shell = subprocess.Popen(["/bin/sh", "-c", "setsid sleep 600 & exec true"])
        shell.wait()
        wait_for(lambda: [p for p in newcomers(others) if p.parent == os.getpid()])
        orphans = newcomers({*others, shell.pid})
        for orphan in orphans:
            send(orphan, signal.SIGKILL)
            os.waitpid(orphan.pid, 0)
    assert len(orphans) == 1


def test_grandchildren_are_descendants_and_parents_are_not() -> None:
    with subprocess.Popen(["/bin/sh", "-c", "sleep 600; true"], start_new_session=True) as shell:
        wait_for(lambda: descendants(shell.pid))
        found = descendants(os.getpid())
        assert shell.pid in found
        assert set(descendants(shell.pid)) < set(found)
        assert os.getpid() not in found
        os.killpg(shell.pid, signal.SIGKILL)


def test_a_signal_never_reaches_a_later_process_of_the_same_pid() -> None:
    child = subprocess.Popen(["sleep", "600"])
    process = read_process(child.pid)
    assert process
    send(process._replace(start_time=process.start_time - 1), signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.3)
    send(process, signal.SIGKILL)
    assert child.wait(timeout=LIMIT_S) == -signal.SIGKILL
    send(process, signal.SIGKILL)  # gone: nothing to do
