"""Locks a run's folder, so that a second run is refused before it changes a file of the first."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from dist_moe.errors import UserError, needs_folder
from dist_moe.files import FileLockedError, file_lock

LAUNCH_LOCK = "launch.lock"
SUCCESSION_S = 10.0
"""A worker that a launcher starts again may have to wait for the end of the one before it."""
ORPHAN_S = 3.0
"""A worker ends by itself within this time after its launch has been killed."""
RETRY_S = 0.1


class RunInUseError(UserError):
    """Another job uses run.dir."""


def rank_lock(run_dir: Path, rank: int) -> Path:
    """Return the file that a worker of this rank locks."""
    return run_dir / "workers" / f"rank-{rank}.lock"


@contextlib.contextmanager
def lock_for_launch(run_dir: Path) -> Iterator[None]:
    """Lock the folder for a launch, whose workers lock it too, each the file of its rank.

    Raises:
        RunInUseError: Another job uses the folder, however it was started.
        RunFolderError: The folder cannot be written.
    """
    with _locked(run_dir, run_dir / LAUNCH_LOCK):
        with _locked(run_dir, rank_lock(run_dir, 0), ORPHAN_S):
            pass
        yield


@contextlib.contextmanager
def lock_for_worker(run_dir: Path, rank: int, launched: bool) -> Iterator[None]:
    """Lock the folder for the life of a worker.

    Args:
        run_dir: The run's folder.
        rank: The worker's rank.
        launched: Whether `dist-moe launch` has started it, and has locked the folder.

    Raises:
        RunInUseError: Another job uses the folder, however it was started.
        RunFolderError: The folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if rank == 0 and not launched:
            stack.enter_context(_locked(run_dir, run_dir / LAUNCH_LOCK))
        stack.enter_context(_locked(run_dir, rank_lock(run_dir, rank), SUCCESSION_S if launched else ORPHAN_S))
        yield


@contextlib.contextmanager
def _locked(run_dir: Path, path: Path, limit_s: float = 0.0) -> Iterator[None]:
    deadline_s = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        while not _enter(stack, run_dir, path):
            if time.monotonic() >= deadline_s:
                rule = f"run.dir={run_dir} is in use by a running job"
                raise RunInUseError(f"{rule}; wait for it, end it, or set another run.dir")
            time.sleep(RETRY_S)
        yield


def _enter(stack: contextlib.ExitStack, run_dir: Path, path: Path) -> bool:
    """Take a lock for the length of the stack, and return whether it was free."""
    try:
        with needs_folder(run_dir):
            stack.enter_context(file_lock(path, wait=False))
    except FileLockedError:
        return False
    return True
