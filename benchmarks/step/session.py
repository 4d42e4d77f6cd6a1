"""The benchmark's side of a measurement: the processes of one program, which train when they are asked to."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from benchmarks.environment import cores
from benchmarks.step.gate import CORES_VARIABLE, SOCKET_VARIABLE

START_LIMIT_S = 180.0
TURN_LIMIT_S = 300.0
END_LIMIT_S = 10.0
POLL_S = 0.2
LOG_LINES = 20


class CannotRun(RuntimeError):
    """A program does not run a case; the message says why."""


class SessionError(RuntimeError):
    """A program did not start, ended, or did not answer; the message has the end of its output."""


@dataclass(frozen=True)
class Command:
    """One process to start: a worker, or a launcher of all workers."""

    argv: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Turn:
    """What the workers report after some steps.

    Attributes:
        seconds: Wall time of all steps on rank 0.
        loss: Mean of -ln p over the label tokens of the last step, in nats.
        loads: Assignments of each expert over all ranks in the last step, for each MoE layer; empty where unknown.
        peak_mib: Peak of the resident memory of rank 0 since its start.
        bytes: Collective -> bytes that rank 0 gave to it; empty unless they were counted.
    """

    seconds: float
    loss: float
    loads: list[list[int]]
    peak_mib: float
    bytes: dict[str, int]


class Session:
    """The live workers of one program. A context manager, which starts them and ends them.

    Args:
        commands: The processes to start.
        workers: How many workers connect.
        log: The file for their output.

    Attributes:
        start_s: Seconds from the start of the processes to the end of the first step.
    """

    def __init__(self, commands: Sequence[Command], workers: int, log: Path) -> None:
        self._commands = commands
        self._workers = workers
        self._log = log
        self._stack = contextlib.ExitStack()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lines: list[TextIO] = []
        self._sockets: list[socket.socket] = []
        self.start_s = 0.0

    def __enter__(self) -> Self:
        """Start the processes, and wait until each worker has made its first step.

        Raises:
            SessionError: They did not, within START_LIMIT_S.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            began_s = time.monotonic()
            with self._listening() as listener:
                self._start(str(listener.getsockname()))
                self._accept(listener, began_s + START_LIMIT_S)
            self._receive(began_s + START_LIMIT_S)
            self.start_s = time.monotonic() - began_s
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, steps: int, count_bytes: bool = False) -> Turn:
        """Make steps -> what the workers report.

        Args:
            steps: How many.
            count_bytes: Count the bytes of collectives, which takes a little time.

        Raises:
            SessionError: A worker did not answer within TURN_LIMIT_S, or ended.
        """
        message = json.dumps({"steps": steps, "count_bytes": count_bytes}).encode() + b"\n"
        try:
            for connection in self._sockets:
                connection.sendall(message)
        except OSError as error:
            raise self._failed(f"a worker cannot be reached ({error})") from error
        return merge(self._receive(time.monotonic() + TURN_LIMIT_S))

    @contextlib.contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        # The path of a Unix socket has at most 107 characters, so it cannot be in any folder.
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/socket")
            listener.listen(self._workers)
            listener.settimeout(POLL_S)
            yield listener

    def _start(self, address: str) -> None:
        added = {SOCKET_VARIABLE: address, CORES_VARIABLE: ",".join(map(str, cores()))}
        with self._log.open("wb") as log:
            for command in self._commands:
                environment = {**command.environment, **added}
                self._processes.append(
                    subprocess.Popen(
                        command.argv,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )

    def _accept(self, listener: socket.socket, deadline_s: float) -> None:
        found: dict[int, tuple[socket.socket, TextIO]] = {}
        while len(found) < self._workers:
            if any(process.poll() is not None for process in self._processes):
                raise self._failed("a process ended before its first step")
            if time.monotonic() > deadline_s:
                raise self._failed(f"{len(found)} of {self._workers} workers connected within {START_LIMIT_S:.0f} s")
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                lines = connection.makefile("r")
                found[json.loads(lines.readline())["rank"]] = (connection, lines)
        for rank in sorted(found):
            self._sockets.append(found[rank][0])
            self._lines.append(found[rank][1])

    def _receive(self, deadline_s: float) -> list[dict[str, Any]]:
        reports = []
        for connection, lines in zip(self._sockets, self._lines, strict=True):
            connection.settimeout(max(1.0, deadline_s - time.monotonic()))
            try:
                line = lines.readline()
            except OSError as error:
                raise self._failed("a worker did not answer in time") from error
            if not line:
                raise self._failed("a worker ended")
            reports.append(json.loads(line))
        return reports

    def _failed(self, what: str) -> SessionError:
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2 * POLL_S)  # for the rest of its output
        lines = self._log.read_text(errors="replace").splitlines()
        return SessionError("\n".join([what, *lines[-LOG_LINES:]]))

    def _end(self) -> None:
        """Close the connections, on which each worker ends, and kill what is left."""
        for lines, connection in zip(self._lines, self._sockets, strict=True):
            lines.close()
            connection.close()
        deadline_s = time.monotonic() + END_LIMIT_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def merge(reports: Sequence[Mapping[str, Any]]) -> Turn:
    """Return the turn that the reports of all ranks, in the order of ranks, make together."""
    first = reports[0]
    labels = sum(report["labels"] for report in reports)
    loads = first["loads"]
    if loads and not first["over_ranks"]:
        layers = zip(*(report["loads"] for report in reports), strict=True)
        loads = [[sum(counts) for counts in zip(*layer, strict=True)] for layer in layers]
    return Turn(
        seconds=first["seconds"],
        loss=sum(report["nll_sum"] for report in reports) / labels,
        loads=loads,
        peak_mib=first["peak_mib"],
        bytes=first["bytes"],
    )
