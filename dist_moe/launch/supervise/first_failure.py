"""How a worker failed, out of its end and of the files that it wrote, and which of several failed first."""

import json
import signal
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

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
    "often the kernel did it for want of memory: lower train.micro_batch_size or data.sequence_length, "
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


def silent_end(now: float, rank: int, code: int, finished: bool) -> Failure:
    """The end of a worker as its process alone shows it; the answer's `code` is 0 if nothing is wrong."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "a signal"
        lead_s = FATAL_LEAD_S if -code in FATAL else 0.0
        hint = f"; {MEMORY_HINT}" if -code == signal.SIGKILL else ""
        told = f"rank {rank} was ended by {name} (signal {-code}){hint}"
        return Failure(False, now - lead_s, rank, 128 - code, told)
    if code == 0:
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
