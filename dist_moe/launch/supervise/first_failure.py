"""How a worker failed, from its exit and the files that it wrote, and which of several workers failed first."""

import signal
from pathlib import Path
from typing import NamedTuple

from dist_moe.text import plain_text
from dist_moe.worker.contract import OF_THE_JOB, ErrorReport

# Signals after which a worker cannot report an error itself. Errors that this causes on other ranks may be reported up
# to FATAL_LEAD_S before the launch sees that the worker has ended.
FATAL_SIGNALS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS}
FATAL_LEAD_S = 1.0
# A rank with one of these in its error lost its connection to another rank, whose failure is the cause.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exited",
)
MEMORY_HINT = (
    "the kernel often does this when memory runs out: lower train.micro_batch_size or data.sequence_length, "
    "or start fewer workers"
)


class Failure(NamedTuple):
    """How one worker failed; the minimum of several is the one to report.

    Attributes:
        is_consequence: The failure only shows that another worker had failed.
        time: When it was reported, or the process ended; seconds since 1970.
        rank: The worker's rank.
        code: Exit code for the job.
        text: The message for the user.
        of_job: Every worker reports the same; the text is about the job, not about one worker.
    """

    is_consequence: bool
    time: float
    rank: int
    code: int
    text: str
    of_job: bool = False


def failure_from_exit(now: float, rank: int, code: int, finished: bool) -> Failure:
    """Describe the end of a worker that wrote no error report.

    Args:
        now: When it ended, in seconds since 1970.
        rank: The worker's rank.
        code: Its exit code, or -N after signal N.
        finished: Its record says that it finished its work.

    Returns:
        The failure; its `code` is 0 if the worker did not fail.
    """
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "a signal"
        lead_s = FATAL_LEAD_S if -code in FATAL_SIGNALS else 0.0
        hint = f"; {MEMORY_HINT}" if -code == signal.SIGKILL else ""
        return Failure(False, now - lead_s, rank, 128 - code, f"rank {rank} was ended by {name} (signal {-code}){hint}")
    if code == 0:
        message = "exited with code 0 before its work was done"
    else:
        message = f"exited with code {code} and without an error report; see its output above"
    return Failure(False, now, rank, code or (0 if finished else 1), f"rank {rank} {message}")


def failure_from_report(text: str, rank: int, path: Path) -> Failure:
    """Describe a failure from the text of an error file.

    Args:
        text: The content of the file.
        rank: The worker's rank.
        path: Where the user finds the file.

    Raises:
        ValueError: The text is not an error report.
        KeyError: A line is missing.
    """
    report = ErrorReport.parse(text)
    report = report._replace(exception=plain_text(report.exception), message=plain_text(report.message))
    if report.exception in OF_THE_JOB:
        return Failure(False, report.time, rank, report.code, report.message, of_job=True)
    message = f"rank {rank} failed with {report.exception}: {report.message}\n(traceback: {path})"
    is_consequence = any(words in report.message for words in LOST_PEER)
    return Failure(is_consequence, report.time, rank, report.code, message)
