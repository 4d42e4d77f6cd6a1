"""Watches a job's workers through the connections that their minders, beside them on any host, hold to this process."""

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from dist_moe.launch.supervise.first_failure import Failure, failure_of, silent_end
from dist_moe.launch.supervise.protocol import LOG_ALONE, MessageSocket, Rendezvous, ready
from dist_moe.launch.supervise.pty import CLEAR_LINE, CONTROL, SHOW_CURSOR

END_LIMIT_S = 5.0
# What a launcher sends to workers that have not left when it sees that another has.
LAUNCHERS_SIGNALS = (signal.SIGTERM, signal.SIGKILL)


class WorkerMonitor:
    """What is known of the workers so far. Call `poll` often; close it after use.

    What they print is printed here, each line after its rank, and kept by rank in `logs/` of the run's folder, after
    what an earlier run left there.

    address: of this host, which the workers can reach. size: how many workers there are; a launcher that goes on with
    fewer, after it lost a host, changes it. apart: they may be on other hosts, so each is named with its host, and
    ended by its minder.
    """

    def __init__(self, address: str, size: int, run_dir: Path, apart: bool = True) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family, backlog=512)
        self.rendezvous = Rendezvous(address, self._server.getsockname()[1], secrets.token_urlsafe(16))
        self.size = size
        self.apart = apart
        self._run_dir = run_dir
        # Connections that have not said whose they are, and those of workers whose rank is another's by now.
        self._unidentified: list[MessageSocket] = []
        self._replaced: list[MessageSocket] = []
        self._lines: dict[int, MessageSocket] = {}
        self._records: dict[int, dict[str, Any]] = {}
        self._failures: dict[int, Failure] = {}
        self._finished: set[int] = set()
        self._stopped: set[int] = set()
        self._asked: int | None = None
        self._left = False
        self._drawing = False

    def __enter__(self) -> "WorkerMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward_signal(self, signum: int) -> None:
        """Have the signal sent to every worker, also to those that appear for the first time later."""
        self._asked = signum
        for line in self._lines.values():
            line.send({"signal": signum})

    def release_workers(self) -> None:
        """Leave every worker on another host, so that it ends, and wait until its minder says that it has.

        Those of one host are ended as the descendants of this process that they are. No end from here on is a failure.
        """
        self._left = True
        if not self.apart:
            return
        for line in [*self._replaced, *self._lines.values()]:
            with contextlib.suppress(OSError):
                line.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + END_LIMIT_S
        while (self._lines or self._replaced) and time.monotonic() < deadline:
            self.wait(deadline - time.monotonic())
            self.poll()

    def close(self) -> None:
        """Takes no more connections, leaves every worker, and its unfinished drawing."""
        if self._drawing:
            self._draw(f"{SHOW_CURSOR}\n")
        for line in [*self._unidentified, *self._replaced, *self._lines.values()]:
            line.close()
        self._replaced.clear()
        self._lines.clear()
        self._server.close()

    def clear(self) -> None:
        """Removes what the workers of an earlier run wrote of themselves."""
        for path in [*self._run_dir.glob("workers/rank-*.json"), *self._run_dir.glob("errors/rank-*.txt")]:
            path.unlink(missing_ok=True)

    def complete(self) -> bool:
        """Whether every worker has been seen."""
        return len(self._records) == self.size

    def pids(self) -> set[int]:
        """The minders among this process's own descendants; those of several hosts end by themselves."""
        return set() if self.apart else {record["minder"] for record in self._records.values()}

    def wait(self, seconds: float) -> None:
        """Returns when a message comes, or after this time."""
        ready(self._sources(), seconds)

    def poll(self) -> None:
        """Takes notice of all that has come."""
        while spoken := ready(self._sources(), 0):
            for line in [one for one in self._replaced if one in spoken and one.receive() is None]:
                self._replaced.remove(line)
                line.close()
            known = [(rank, line) for rank, line in self._lines.items() if line in spoken]
            for line in [one for one in self._unidentified if one in spoken]:
                self._greet(line)
            for rank, line in known:
                if self._lines.get(rank) is line:
                    self._handle(rank, line.receive())
            if self._server in spoken:
                self._unidentified.append(MessageSocket(self._server.accept()[0]))

    def _sources(self) -> list[socket.socket | MessageSocket]:
        return [self._server, *self._unidentified, *self._replaced, *self._lines.values()]

    def unfinished(self) -> list[int]:
        """The ranks that have neither finished nor stopped on request."""
        return [rank for rank in range(self.size) if rank not in self._finished | self._stopped]

    def stopped(self) -> bool:
        """Whether every rank has stopped on request, its checkpoint saved."""
        return bool(self._stopped) and not self.unfinished()

    def failures(self) -> list[Failure]:
        """Every failure known, the first one first, and those that only follow from another last."""
        return sorted(self._failures.values())

    def place(self, rank: int) -> str:
        """For messages: the rank, and where hosts are several the one that it said it is on."""
        return f"rank {rank} on {self._records[rank]['host']}" if self.apart else f"rank {rank}"

    def _greet(self, line: MessageSocket) -> None:
        """Take a connection for a worker's if its first message says so, and else close it."""
        messages = line.receive()
        if messages == []:
            return  # the rest of its first message is on its way
        self._unidentified.remove(line)
        record, *rest = messages or [{}]
        rank, size = record.get("rank"), record.get("size")
        known = secrets.compare_digest(str(record.get("word")).encode(errors="replace"), self.rendezvous.word.encode())
        if not (known and isinstance(rank, int) and isinstance(size, int) and 0 <= rank < size):
            line.close()
            return
        if self._stopped or (self._asked is not None and rank in self._records):
            # A launcher took the stop, or a failure on the way to it, for one to mend, and has started this one again.
            self._replaced.append(line)
            return
        # A launcher that restarts workers gives their ranks again.
        self._resize(size)
        if rank in self._lines:
            # Closed, it would tell its minder that this launch is gone.
            self._replaced.append(self._lines[rank])
        self._lines[rank], self._records[rank] = line, record
        self._failures.pop(rank, None)
        self._finished.discard(rank)
        self._keep(rank, "")
        if self._asked is not None:
            line.send({"signal": self._asked})
        if rest:
            self._handle(rank, rest)

    def _resize(self, size: int) -> None:
        """Forget the ranks that are no more."""
        self.size = size
        self._replaced += [line for rank, line in self._lines.items() if rank >= size]
        for known in (self._records, self._failures, self._lines):
            for rank in [one for one in known if one >= size]:
                del known[rank]

    def _handle(self, rank: int, messages: list[dict[str, Any]] | None) -> None:
        if messages is None:
            self._lines.pop(rank).close()
            if rank not in self._finished | self._stopped:
                told = f"{self.place(rank)} was lost: its host ended, or the network to it was cut"
                self._failures.setdefault(rank, Failure(False, time.time(), rank, 1, told))
            return
        for message in messages:
            if "output" in message:
                self._print(rank, int(message["output"]), str(message.get("text", "")))
            elif "drawn" in message:
                self._draw(str(message["drawn"]))
            elif "report" in message:
                self._failures[rank] = self._reported(rank, str(message["report"]))
            elif "ended" in message:
                self._end(rank, message)

    def _reported(self, rank: int, report: str) -> Failure:
        """What an error file says; the clocks of hosts differ, so what comes first from several is first."""
        folder = Path() if self.apart else self._run_dir
        try:
            found = failure_of(report, rank, folder / "errors" / f"rank-{rank}.txt")
        except (ValueError, KeyError):
            told = f"{self.place(rank)} failed, and its report cannot be read: {report[:200]!r}"
            return Failure(False, time.time(), rank, 1, told)
        found = found._replace(text=found.text.replace(f"rank {rank}", self.place(rank), 1))
        return found._replace(time=time.time()) if self.apart else found

    def _print(self, rank: int, output: int, text: str) -> None:
        """A closed terminal is no reason to end the job."""
        prefix = f"[{rank}@{self._records[rank]['host']}] " if self.apart else f"[rank {rank}] "
        stream = sys.stderr if output == 2 else sys.stdout
        if output != LOG_ALONE:
            with contextlib.suppress(OSError, ValueError):
                stream.write(CLEAR_LINE if self._drawing and stream.isatty() else "")
                stream.write("".join(f"{prefix}{line}\n" for line in text.split("\n")))
                stream.flush()
            self._drawing = False
        self._keep(rank, text + "\n")

    def _draw(self, text: str) -> None:
        """What rank 0 draws on this terminal; it may leave the last line for a live one."""
        shown = CONTROL.sub(b"", text.encode())
        self._drawing = not shown.endswith(b"\n") if shown else self._drawing
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(text)
            sys.stdout.flush()

    def _keep(self, rank: int, text: str) -> None:
        """In the rank's log, which is there from the worker's start; a full disk is no reason to end the job."""
        with contextlib.suppress(OSError):
            folder = self._run_dir / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{rank}.log").open("a", encoding="utf-8") as log:
                log.write(text)

    def _end(self, rank: int, message: dict[str, Any]) -> None:
        """How a worker ended, by its own record and by its process."""
        code, state = os.waitstatus_to_exitcode(int(message["ended"])), message.get("state")
        # The ranks leave together, with all saved: the one that its launcher was quicker to end has stopped too.
        if state == "stopped" or (self._stopped and -code in LAUNCHERS_SIGNALS):
            self._stopped.add(rank)
            return
        when = time.time() if self.apart else float(message["time"])
        end = silent_end(when, rank, code, finished=state == "finished")
        if end.code == 0:
            self._finished.add(rank)
        elif not (self._left and -code in LAUNCHERS_SIGNALS):
            self._failures.setdefault(rank, end._replace(text=end.text.replace(f"rank {rank}", self.place(rank))))
