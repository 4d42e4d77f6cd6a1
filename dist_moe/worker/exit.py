"""Tells the outside how a worker fares: a record of its process, its error in a file, and a hard exit."""

import contextlib
import json
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from dist_moe.errors import ConfigError, RunFolderError, UserError, needs_folder
from dist_moe.worker.contract import (
    INTERRUPTED_CODE,
    LAUNCH_VARIABLE,
    STOPPED_CODE,
    USER_ERROR_CODE,
    error_file,
    record_file,
)

END_BY_LAUNCH_S = 5.0
# Characters of an error's own text in its report; all of it stands in the traceback.
LONGEST_MESSAGE = 8000


class Stopped(Exception):
    """The run was asked to stop, and has saved a checkpoint from which it goes on when it is started again."""


@contextlib.contextmanager
def report_failure(run_dir: str | Path, rank: int) -> Iterator[None]:
    """Surrounds everything that a worker does, and tells whoever started the job how it went.

    On entry it writes `workers/rank-N.json` (pid, start time, state "running"), removes the error of an
    earlier run, and ties the worker to the `dist-moe launch` that started it, if one did: when that process
    is gone, even by SIGKILL, the worker ends too. After the block the state is "finished". An exception in
    the block ends the process as `exit_hard` says.

    Meant for a process that does nothing else: it does not give control back after an error.

    run_dir: the run's folder. rank: this worker's number among all workers.
    """
    folder = Path(run_dir)
    with exit_hard(folder, rank), needs_folder(folder):
        error_file(folder, rank).unlink(missing_ok=True)
        write_record(folder, rank, "running")
    end_with_launch(os.environ.get(LAUNCH_VARIABLE))
    try:
        with exit_hard(folder, rank):
            yield
    finally:
        # Only success comes by here, sys.exit(0) included: exit_hard does not return from anything else.
        note_state(folder, rank, "finished", code=0)


@contextlib.contextmanager
def exit_hard(run_dir: str | Path, rank: int) -> Iterator[None]:
    """Turns an exception in the block into a report and an immediate end of the process.

    The report is `errors/rank-N.txt` (time, rank, exit code, exception type, message, traceback), the same
    traceback on stderr, and the state "failed" in `workers/rank-N.json`. The exit code is 2 for a
    `UserError`, the code of a `SystemExit`, 130 for Ctrl-C (which is no error and gets no file), 75 for `Stopped`
    (no error either; the state is "stopped"), and 1 otherwise. A `UserError` is told without a traceback, and a
    `ConfigError`, which is the same on every rank, once: by `dist-moe launch` or by rank 0.

    Why the exit is hard (`os._exit`): a rank that raises while the others stand in a collective must be gone
    at once, since its closed connections are what frees them. An ordinary exit first unwinds the context
    managers around this one, joins threads and runs destructors. `destroy_process_group`, the destructor of a
    communicator with work in flight, or a thread of a library may wait there for ranks that wait for this
    one: the error would never be seen, and the job would stand still until the time-out of the collective.
    The operating system reclaims everything such an exit would have freed.

    So enter it just inside whatever may block while it is torn down (the process group), and around whatever
    has something to save (writers of metrics): those close before the exit, this one leaves the rest.
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
    """Records the state "stopped", and leaves: no failure, and not the end of the run either."""
    try:
        note_state(folder, rank, "stopped", STOPPED_CODE)
        flush_output()
    finally:
        os._exit(STOPPED_CODE)


def end_process(folder: Path, rank: int, error: BaseException, code: int) -> NoReturn:
    """Reports `error` and leaves with `code`, whatever happens on the way (a full disk, a closed stderr)."""
    launched, reported = LAUNCH_VARIABLE in os.environ, False
    try:
        if not isinstance(error, KeyboardInterrupt):
            trace = "".join(traceback.format_exception(error))
            with contextlib.suppress(OSError):  # A full disk must not keep the error from stderr.
                write_atomically(error_file(folder, rank), error_report(rank, error, code, trace))
                reported = launched
            if not isinstance(error, UserError):
                sys.stderr.write(f"rank {rank} failed:\n{trace}")
            elif not reported and (rank == 0 or not isinstance(error, (ConfigError, RunFolderError))):
                sys.stderr.write(f"{error}\n")
        note_state(folder, rank, "failed", code, tell=not isinstance(error, RunFolderError))
        flush_output()
        if reported and isinstance(error, UserError):
            # The launch ends the job as soon as it sees the report, and a launcher that is ended says
            # nothing; one that sees a worker end writes a page about it below which the message would be
            # lost.
            time.sleep(END_BY_LAUNCH_S)
    finally:
        os._exit(code)


def error_report(rank: int, error: BaseException, code: int, trace: str) -> str:
    """The text of an error file: `key: value` lines (the message as JSON), an empty line, the traceback."""
    return (
        f"time: {datetime.now(UTC).isoformat(timespec='microseconds')}\n"
        f"rank: {rank}\n"
        f"code: {code}\n"
        f"exception: {type(error).__name__}\n"
        f"message: {json.dumps(str(error)[:LONGEST_MESSAGE])}\n"
        f"\n{trace}"
    )


def flush_output() -> None:
    """Writes out what Python still holds; a reader that has gone away is no reason to stay."""
    for flush in (sys.stdout.flush, sys.stderr.flush, logging.shutdown):
        with contextlib.suppress(OSError, ValueError):
            flush()


def note_state(folder: Path, rank: int, state: str, code: int, tell: bool = True) -> None:
    """As `write_record`, at the end of a worker: a disk that fails changes nothing of how it ends, and is told."""
    try:
        write_record(folder, rank, state, code)
    except OSError as error:
        text = record_text(rank, state, code).encode()
        if not overwrite(record_file(folder, rank), text) and tell:
            sys.stderr.write(f"rank {rank} is {state}, which cannot be recorded in {folder}: {error}\n")


def overwrite(path: Path, content: bytes) -> bool:
    """Put other bytes in the place of those of a file, for which a full disk has room -> whether that was possible."""
    try:
        with path.open("r+b") as file:
            file.write(content.ljust(os.fstat(file.fileno()).st_size))
    except OSError:
        return False
    return True


def write_record(folder: Path, rank: int, state: str, code: int | None = None) -> None:
    """Writes `workers/rank-N.json`; pid and start time together name one process for good."""
    write_atomically(record_file(folder, rank), record_text(rank, state, code))


def record_text(rank: int, state: str, code: int | None) -> str:
    record = {
        "rank": rank,
        "pid": os.getpid(),
        "start_time": start_time(os.getpid()),
        "state": state,
        "code": code,
    }
    return json.dumps(record) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the whole new text or what was there before, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since the host did (field 22 of /proc/PID/stat)."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[19])


def end_with_launch(launch: str | None) -> None:
    """Ends this process as soon as the process `launch` ("PID:START_TIME") has ended; nothing to do for None.

    The thread sleeps in the kernel until then, and runs even while the main thread waits in a collective.
    """
    if launch is None:
        return
    pid, _, started = launch.partition(":")
    try:
        handle = os.pidfd_open(int(pid))
        same = start_time(int(pid)) == int(started)
    except (ProcessLookupError, FileNotFoundError):
        same = False
    if not same:
        os._exit(1)

    def wait() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-launch", daemon=True).start()
