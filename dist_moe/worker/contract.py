"""What a launch and its workers agree on: exit codes, signals, variables, file names and formats. Imports no torch."""

import json
import re
import signal
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from dist_moe.untrusted import read_json

LAUNCH_VARIABLE = "DIST_MOE_LAUNCH"
"""Set by a launch for its workers: where its agents connect, or, below an agent, the process of the agent."""
LAUNCH_FILE_VARIABLE = "DIST_MOE_LAUNCH_FILE"
"""Set by a worker whose DIST_MOE_LAUNCH named a file: the former value, which its launcher still has."""
NOTICE_VARIABLE = "DIST_MOE_NOTICE"
"""Set by an agent for its worker: a file descriptor to write to once the error report is in its file."""
VISIBLE_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
KEPT_DEVICES_VARIABLE = "DIST_MOE_VISIBLE_DEVICES"
"""A copy of the user's CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher overwrites; the worker restores it."""
PORT_VARIABLE = "DIST_MOE_PORT"
"""A port for the workers' store in place of MASTER_PORT, which torchrun chooses among those of outgoing connections."""
SECRET_VARIABLE = "DIST_MOE_RENDEZVOUS_SECRET"
"""Proves to the torchrun of each host that a state of the rendezvous is of this launch; in hexadecimal digits."""
BACKEND = "dist-moe"
"""The name of the rendezvous of `dist_moe/comm/rendezvous.py` for torchrun."""
USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130
STOPPED_CODE = 75
"""Exit code of a worker that stopped on request after it had saved a checkpoint (EX_TEMPFAIL of sysexits.h)."""
OF_THE_JOB = ("ConfigError", "JobCheckpointError", "RunChangedError")
"""Exceptions that every rank raises with the same message, which names no rank or the right one."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Requests to save a checkpoint and stop; Slurm sends SIGUSR1 before a time limit."""
MAX_MESSAGE_CHARACTERS = 8000
"""Of an exception's message in an error report; the traceback below it has all of it."""


PROCESS_IDENTITY = re.compile("[0-9]{1,9}:[0-9]{1,18}")
"""What `process_identity` returns."""


class WorkerState(StrEnum):
    """What a worker's record says about it."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class WorkerRecord(NamedTuple):
    """The content of `workers/rank-N.json`.

    Attributes:
        rank: The worker's rank.
        pid: Its process; together with `start_time` never reused.
        start_time: Clock ticks from the start of the host to that of the process.
        state: What the worker is doing, or how it ended.
        code: Its exit code, or None while it runs.
    """

    rank: int
    pid: int
    start_time: int
    state: WorkerState
    code: int | None

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(self._asdict()) + "\n"


class ErrorReport(NamedTuple):
    """The content of `errors/rank-N.txt`, without the traceback.

    Attributes:
        time: Seconds since 1970.
        rank: The worker's rank.
        code: Its exit code.
        exception: The name of the exception's class.
        message: The exception's message, at most `MAX_MESSAGE_CHARACTERS`.
    """

    time: float
    rank: int
    code: int
    exception: str
    message: str

    def to_text(self, trace: str) -> str:
        """Return the text of the file: `key: value` lines (the message as JSON), an empty line, the traceback."""
        when = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="microseconds")
        return (
            f"time: {when}\n"
            f"rank: {self.rank}\n"
            f"code: {self.code}\n"
            f"exception: {self.exception}\n"
            f"message: {json.dumps(self.message[:MAX_MESSAGE_CHARACTERS])}\n"
            f"\n{trace}"
        )

    @classmethod
    def parse(cls, text: str) -> "ErrorReport":
        """Read the text of a file.

        Raises:
            ValueError: The text is not an error report.
            KeyError: A line is missing.
        """
        head = text.split("\n\n", 1)[0]
        fields = dict(line.split(": ", 1) for line in head.splitlines())
        time = datetime.fromisoformat(fields["time"]).timestamp()
        message, code = json.loads(fields["message"]), int(fields["code"])
        if not (isinstance(message, str) and 0 < code < 256):
            raise ValueError("a message that is no text, or a code that is no exit code of a failure")
        return cls(time, int(fields["rank"]), code, fields["exception"], message[:MAX_MESSAGE_CHARACTERS])


def error_file(run_dir: Path, rank: int) -> Path:
    """Return the file in which a worker reports its error."""
    return run_dir / "errors" / f"rank-{rank}.txt"


def record_file(run_dir: Path, rank: int) -> Path:
    """Return the file in which a worker records its process and its state."""
    return run_dir / "workers" / f"rank-{rank}.json"


def log_file(run_dir: Path, rank: int) -> Path:
    """Return the file in which a launch keeps a worker's output."""
    return run_dir / "logs" / f"rank-{rank}.log"


def read_state(run_dir: Path, rank: int) -> str | None:
    """Return the state in a worker's record, or None where there is no record."""
    try:
        return read_json(record_file(run_dir, rank)).get("state")
    except FileNotFoundError:
        return None


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since its host did (field 22 of /proc/PID/stat).

    psutil's `create_time` adds the time at which the host started, as each process that asks for it sees the clock at
    that moment: two processes may get different values for one process.

    Raises:
        FileNotFoundError: There is no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[19])  # the name, in brackets, may contain spaces and brackets


def process_identity(pid: int) -> str:
    """Return "PID:START_TIME", which names one process even after its pid is reused."""
    return f"{pid}:{start_time(pid)}"
