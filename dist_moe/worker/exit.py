"""Records a worker's state, reports its error in a file, and ends its process without waiting for other ranks."""

import contextlib
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from dist_moe.errors import RunFolderError, UserError, needs_folder
from dist_moe.files import open_no_link, write_atomically
from dist_moe.worker.contract import (
    INTERRUPTED_CODE,
    LAUNCH_VARIABLE,
    NOTICE_VARIABLE,
    OF_THE_JOB,
    STOPPED_CODE,
    USER_ERROR_CODE,
    ErrorReport,
    WorkerRecord,
    WorkerState,
    error_file,
    process_identity,
    record_file,
    start_time,
)
from dist_moe.worker.shared_storage import try_again

END_BY_LAUNCH_S = 5.0
"""How long a worker with a user's error waits for the launch to end it."""


class Stopped(Exception):
    """The run stopped on request, after it saved a checkpoint from which a later start resumes."""


@contextlib.contextmanager
def report_failure(run_dir: str | Path, rank: int) -> Iterator[None]:
    """Surround all work of a worker, and report how it ends.

    On entry, write `workers/rank-N.json` (pid, start time, state "running"), remove the error report of an earlier
    run, and end this process as soon as the launch that started it, if any, is gone, even by SIGKILL. After the block
    the state is "finished". An exception in the block ends the process as described in `exit_hard`.

    For a process that does nothing else: control does not return after an error.

    Args:
        run_dir: The run's folder.
        rank: This worker's rank among all workers.
    """
    folder = Path(run_dir)
    with exit_hard(folder, rank), needs_folder(folder):
        try_again(lambda: error_file(folder, rank).unlink(missing_ok=True))
        try_again(lambda: write_record(folder, rank, WorkerState.RUNNING))
    end_with_launch(os.environ.get(LAUNCH_VARIABLE))
    try:
        with exit_hard(folder, rank):
            yield
    finally:
        # Reached after success only, sys.exit(0) included: exit_hard returns from nothing else.
        record_final_state(folder, rank, WorkerState.FINISHED, code=0)


@contextlib.contextmanager
def exit_hard(run_dir: str | Path, rank: int) -> Iterator[None]:
    """Turn an exception in the block into a report and an immediate end of the process.

    The report is `errors/rank-N.txt` (time, rank, exit code, exception type, message, traceback), the same traceback
    on stderr, and the state "failed" in `workers/rank-N.json`. The exit code is 2 for a `UserError`, the code of a
    `SystemExit`, 130 for Ctrl-C (no error, so without a file), 75 for `Stopped` (no error either; the state is
    "stopped"), and 1 otherwise. A `UserError` is printed without a traceback, and one that is the same on every
    rank (OF_THE_JOB) once: by `dist-moe launch` or by rank 0.

    Why the exit is hard (`os._exit`): a rank that raises while the others wait in a collective must end at once, since
    its closed connections are what ends their wait. An ordinary exit first unwinds the context managers around this
    one, joins threads and runs destructors. `destroy_process_group`, the destructor of a communicator with work in
    flight, or a thread of a library may wait there for ranks that wait for this one: the error would never be seen,
    and the job would hang until the time-out of the collective. The operating system frees everything that such an
    exit would have freed.

    So enter it just inside what may block while it is torn down (the process group), and outside what has something
    to save (writers of metrics), which then closes before the exit.

    Args:
        run_dir: The run's folder.
        rank: This worker's rank among all workers.
    """
    folder = Path(run_dir)
    try:
        yield
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        end_process(folder, rank, stop, stop.code if isinstance(stop.code, int) else 1)
    except KeyboardInterrupt as stop:
        end_process(folder, rank, stop, INTERRUPTED_CODE)
    except Stopped:
        end_stopped(folder, rank)
    except UserError as error:
        end_process(folder, rank, error, USER_ERROR_CODE)
    except BaseException as error:
        end_process(folder, rank, error, 1)


def end_stopped(folder: Path, rank: int) -> NoReturn:
    """Record the state "stopped" and exit: neither a failure nor the end of the run."""
    try:
        record_final_state(folder, rank, WorkerState.STOPPED, STOPPED_CODE)
        flush_output()
    finally:
        os._exit(STOPPED_CODE)


def end_process(folder: Path, rank: int, error: BaseException, code: int) -> NoReturn:
    """Report `error` and exit with `code`, also where reporting fails (a full disk, a closed stderr)."""
    launched, reported = LAUNCH_VARIABLE in os.environ, False
    try:
        if not isinstance(error, KeyboardInterrupt):
            trace = "".join(traceback.format_exception(error))
            with contextlib.suppress(OSError):  # a full disk must not keep the error from stderr
                report = error_report(rank, error, code, trace)
                try_again(lambda: write_atomically(error_file(folder, rank), report))
                reported = launched
                notify_agent()
            if not isinstance(error, UserError):
                sys.stderr.write(f"rank {rank} failed:\n{trace}")
            elif not reported and (rank == 0 or not is_of_the_job(error)):
                sys.stderr.write(f"{error}\n")
        record_final_state(folder, rank, WorkerState.FAILED, code, warn=not isinstance(error, RunFolderError))
        flush_output()
        if reported and isinstance(error, UserError):
            # The launch ends the job as soon as it has the report, and a launcher that is ended prints nothing. One
            # that sees a worker end prints a page about it, in which the user's message would be lost.
            time.sleep(END_BY_LAUNCH_S)
    finally:
        os._exit(code)


def is_of_the_job(error: BaseException) -> bool:
    """Return whether every rank raises the same."""
    return isinstance(error, RunFolderError) or type(error).__name__ in OF_THE_JOB


def error_report(rank: int, error: BaseException, code: int, trace: str) -> str:
    """Return the text of the error file for an exception that was caught now."""
    return ErrorReport(time.time(), rank, code, type(error).__name__, str(error)).to_text(trace)


def notify_agent() -> None:
    """Notify the agent of this worker, if it has one, that the error report can be read."""
    descriptor = os.environ.pop(NOTICE_VARIABLE, "")
    if descriptor and os.environ.get(LAUNCH_VARIABLE, "").startswith(f"{os.getppid()}:"):
        with contextlib.suppress(OSError):
            os.write(int(descriptor), b"\n")


def flush_output() -> None:
    """Flush stdout, stderr and the loggers; a closed pipe is ignored."""
    for flush in (sys.stdout.flush, sys.stderr.flush, logging.shutdown):
        with contextlib.suppress(OSError, ValueError):
            flush()


def record_final_state(folder: Path, rank: int, state: WorkerState, code: int, warn: bool = True) -> None:
    """Write the record of a worker that ends, in the place of its old one where the disk is full.

    Args:
        folder: The run's folder.
        rank: The worker's rank.
        state: How it ends.
        code: Its exit code.
        warn: Print a line to stderr where the record cannot be written. Such a failure is never raised, since it must
            not change how the worker ends.
    """
    try:
        try_again(lambda: write_record(folder, rank, state, code))
    except OSError as error:
        text = own_record(rank, state, code).to_json().encode()
        if not overwrite(record_file(folder, rank), text) and warn:
            sys.stderr.write(f"rank {rank}: cannot record the state {state} in {folder}: {error}\n")


def overwrite(path: Path, content: bytes) -> bool:
    """Replace a file's bytes in place, which needs no room on the disk, and return whether that succeeded."""
    try:
        with open(path, "r+b", opener=open_no_link) as file:
            file.write(content.ljust(os.fstat(file.fileno()).st_size))
    except OSError:
        return False
    return True


def write_record(folder: Path, rank: int, state: WorkerState, code: int | None = None) -> None:
    """Write `workers/rank-N.json` about this process.

    Raises:
        OSError: The file cannot be written.
    """
    write_atomically(record_file(folder, rank), own_record(rank, state, code).to_json())


def own_record(rank: int, state: WorkerState, code: int | None) -> WorkerRecord:
    """Return the record of this process."""
    return WorkerRecord(rank, os.getpid(), start_time(os.getpid()), state, code)


def end_with_launch(launch: str | None) -> None:
    """End this process with exit code 1 as soon as the process `launch` has ended.

    A daemon thread waits for it in the kernel, so it ends this process even while the main thread is in a collective.

    Args:
        launch: "PID:START_TIME" as `process_identity` returns it, or None, with which this function does nothing.
    """
    if launch is None:
        return
    try:
        pid = int(launch.partition(":")[0])
        handle = os.pidfd_open(pid)
        # Compared after the handle was opened, so that the handle is of this process, not of a later one with its pid.
        running = process_identity(pid) == launch
    except (ProcessLookupError, FileNotFoundError):
        running = False
    if not running:
        os._exit(1)

    def wait() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-launch", daemon=True).start()
