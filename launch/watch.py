"""Watches a job's workers through the files they write and the kernel's table, and says who failed first."""

import contextlib
import json
import os
import select
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from dist_moe.launch.processes import collected_status, read_process

# Signals that neither a launcher nor a dying peer sends: they come before any error of another rank within
# this time.
FATAL = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS}
FATAL_LEAD_S = 1.0
# A rank that says this has seen the end of another rank, which is then the one to name.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exited",
)
MEMORY_HINT = (
    "often the kernel did it for want of memory: lower train.micro_batch or data.sequence_length, "
    "or start fewer workers"
)


class Failure(NamedTuple):
    """How one worker failed; the least of several is the one to name.

    effect: it only shows that another worker had failed. time: of the report, or of the end of the process;
    seconds since 1970. code: exit code to pass on. of_config: the configuration is wrong; then the text says
    so of the job, not of the worker.
    """

    effect: bool
    time: float
    rank: int
    code: int
    text: str
    of_config: bool = False


class Watch:
    """What is known of the workers so far. Call `look` often; close it after use.

    run_dir: the folder where the workers write `workers/` and `errors/`. size: how many workers there are.
    """

    def __init__(self, run_dir: Path, size: int) -> None:
        self.run_dir = run_dir
        self.size = size
        self.records: dict[int, dict[str, Any]] = {}
        self.handles: dict[int, int] = {}
        self.deaths: dict[int, Failure] = {}

    def clear(self) -> None:
        """Removes what the workers of an earlier run wrote."""
        for path in [*self.run_dir.glob("workers/rank-*.json"), *self.run_dir.glob("errors/rank-*.txt")]:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        while self.handles:
            os.close(self.handles.popitem()[1])

    def let_go(self) -> None:
        """The workers of this host are ended as the descendants of this process that they are."""

    def wait(self, seconds: float) -> None:
        """Returns when a worker ends (its parent may soon collect how), or after this time."""
        select.select(list(self.handles.values()), [], [], seconds)

    def look(self) -> None:
        """Takes notice of workers that have appeared and of workers that have ended."""
        for rank in range(self.size):
            if rank in self.deaths:
                continue
            if rank not in self.handles:
                self._appear(rank)
            record = self.records.get(rank)
            if record is None:
                continue
            process = read_process(record["pid"])
            if process is None or process.start_time != record["start_time"]:
                # The launcher has been quicker to ask; only the handle still knows.
                self._end(rank, collected_status(self.handles[rank]) if rank in self.handles else None)
            elif process.ended:
                self._end(rank, process.status)

    def complete(self) -> bool:
        """Whether every worker has been seen."""
        return len(self.records) == self.size

    def pids(self) -> set[int]:
        return {record["pid"] for record in self.records.values()}

    def unfinished(self) -> list[int]:
        """The ranks that have not written that they finished."""
        records = {rank: read_record(self.run_dir, rank) or {} for rank in range(self.size)}
        return [rank for rank, record in records.items() if record.get("state") != "finished"]

    def failures(self) -> list[Failure]:
        """Every failure known, the first one first, and those that only follow from another last."""
        reports = {rank: read_report(self.run_dir, rank) for rank in range(self.size)}
        known = [report for report in reports.values() if report]
        silent = [end for rank, end in self.deaths.items() if not reports[rank] and end.code != 0]
        return sorted([*known, *silent])

    def _appear(self, rank: int) -> None:
        record = read_record(self.run_dir, rank)
        if record is None:
            return
        self.records[rank] = record
        with contextlib.suppress(ProcessLookupError):
            self.handles[rank] = os.pidfd_open(record["pid"])

    def _end(self, rank: int, status: int | None) -> None:
        """Notes that a worker has ended; `status` as `os.waitpid` gives it, None if unknown."""
        if rank in self.handles:
            os.close(self.handles.pop(rank))
        state = (read_record(self.run_dir, rank) or {}).get("state")
        code = None if status is None else os.waitstatus_to_exitcode(status)
        self.deaths[rank] = silent_end(time.time(), rank, code, finished=state == "finished")


def silent_end(now: float, rank: int, code: int | None, finished: bool) -> Failure:
    """The end of a worker as its process alone shows it; the answer's `code` is 0 if nothing is wrong."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "a signal"
        lead_s = FATAL_LEAD_S if -code in FATAL else 0.0
        hint = f"; {MEMORY_HINT}" if -code == signal.SIGKILL else ""
        told = f"rank {rank} was ended by {name} (signal {-code}){hint}"
        return Failure(False, now - lead_s, rank, 128 - code, told)
    if code is None:
        told = "ended without a report; how is not known"
    elif code == 0:
        told = "ended with exit code 0 before its work was done"
    else:
        told = f"ended with exit code {code} and without a report; see its output above"
    return Failure(False, now, rank, code or (0 if finished else 1), f"rank {rank} {told}")


def read_record(run_dir: Path, rank: int) -> dict[str, Any] | None:
    """What the worker wrote about its process, or None."""
    try:
        return json.loads((run_dir / "workers" / f"rank-{rank}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_report(run_dir: Path, rank: int) -> Failure | None:
    """What the worker wrote about its error, or None."""
    path = run_dir / "errors" / f"rank-{rank}.txt"
    try:
        return failure_of(path.read_text(encoding="utf-8"), rank, path)
    except FileNotFoundError:
        return None


def failure_of(report: str, rank: int, path: Path) -> Failure:
    """What the text of an error file says; path: where it lies."""
    head = report.split("\n\n", 1)[0]
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    when = datetime.fromisoformat(fields["time"]).timestamp()
    message = json.loads(fields["message"])
    if fields["exception"] == "ConfigError":
        return Failure(False, when, rank, int(fields["code"]), message, of_config=True)
    text = f"rank {rank} failed with {fields['exception']}: {message}\n(traceback: {path})"
    effect = any(words in message for words in LOST_PEER)
    return Failure(effect, when, rank, int(fields["code"]), text)
