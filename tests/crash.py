"""Test processes under pytest-xdist: each file runs in one of them, and one that hangs is ended and replaced.

A test that hangs in Python is ended by pytest-timeout, which raises in it. One that hangs in C (a collective, a lock)
is not: there faulthandler's watchdog, which needs no GIL, writes the stacks and ends the whole process, and xdist
starts another one for the tests that are left. That costs the test, and no other.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class FileScheduling(LoadFileScheduling):
    """Gives each file to one process; after a crash, the test that crashed is not run again.

    xdist 3.8 would give it to the next process, which would crash too, until no more are started.
    """

    def _reschedule(self, node: WorkerController) -> None:
        """Give a process files until it has more than two tests; the last one waits for a next one, or for the end."""
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) <= 2:
            super()._reschedule(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """Take a process that has ended out of the schedule -> the test that it was in, if any."""
        files = self.assigned_work.pop(node)
        left = {file: [test for test, done in tests.items() if not done] for file, tests in files.items()}
        pending = [test for tests in left.values() for test in tests]
        if not pending:
            return None
        crashed = pending[0]
        for file, tests in reversed(left.items()):
            if again := {test: False for test in tests if test != crashed}:
                self.workqueue[file] = again
                self.workqueue.move_to_end(file, last=False)
        for other in self.assigned_work:
            self._reschedule(other)
        return crashed


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling | None:
    """The schedule for `--dist loadfile`; the other ways to distribute tests are xdist's own."""
    return FileScheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController, error: object | None) -> None:
    """Kill what a crashed test process has left: jobs that it started, and their workers."""
    if error is not None:
        marks = {
            f"PYTEST_XDIST_TESTRUNUID={node.workerinput['testrunuid']}".encode(),
            f"PYTEST_XDIST_WORKER={node.gateway.id}".encode(),
        }
        for pid in _with_environment(marks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _with_environment(marks: set[bytes]) -> list[int]:
    """The ids of the processes that were started with all these variables."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # not a process, one of another user, or one that has ended
            if marks <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found
