"""Monitors a job's workers through the connections that their agents, on any host, hold to this process."""

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from dist_moe.launch.supervise.first_failure import Failure, failure_from_exit, failure_from_report
from dist_moe.launch.supervise.protocol import LOG_ONLY, MessageSocket, Rendezvous, wait_readable
from dist_moe.launch.supervise.pty import CLEAR_LINE, CONTROL, SHOW_CURSOR
from dist_moe.worker.contract import WorkerState, error_file, log_file

RELEASE_TIMEOUT_S = 5.0
BACKLOG = 512
REPORT_EXCERPT_CHARACTERS = 200
# What a launcher sends to the workers that still run when it sees that another has ended.
LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGKILL)


class WorkerMonitor:
    """The state of all workers, updated by `poll`. Close it after use.

    The workers' output is printed here, each line with its rank, and appended to a file per rank in `logs/` of the
    run's folder.

    Args:
        address: An address of this host that the workers can reach.
        size: Number of workers; a launcher that continues with fewer after it lost a host changes it.
        run_dir: The run's folder.
        multi_host: Workers may be on other hosts, so messages name the host, and agents end their workers.
    """

    def __init__(self, address: str, size: int, run_dir: Path, multi_host: bool = True) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family, backlog=BACKLOG)
        self.rendezvous = Rendezvous(address, self._server.getsockname()[1], secrets.token_urlsafe(16))
        self.size = size
        self.multi_host = multi_host
        self._run_dir = run_dir
        # Connections without a greeting yet, and those of workers whose rank another worker has by now.
        self._unidentified: list[MessageSocket] = []
        self._replaced: list[MessageSocket] = []
        self._agents: dict[int, MessageSocket] = {}
        self._greetings: dict[int, dict[str, Any]] = {}
        self._failures: dict[int, Failure] = {}
        self._finished: set[int] = set()
        self._stopped: set[int] = set()
        self._forwarded: int | None = None
        self._released = False
        self._line_is_live = False

    def __enter__(self) -> "WorkerMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward_signal(self, signum: int) -> None:
        """Send the signal to every worker, also to those that connect for the first time later."""
        self._forwarded = signum
        for agent in self._agents.values():
            agent.send({"signal": signum})

    def release_workers(self) -> None:
        """Disconnect from the workers on other hosts, so that their agents end them, and wait at most 5 s for that.

        Workers on this host alone are ended as descendants of this process. From here on, workers that launchers end
        do not count as failed.
        """
        self._released = True
        if not self.multi_host:
            return
        for agent in [*self._replaced, *self._agents.values()]:
            with contextlib.suppress(OSError):
                # The other direction stays open for the agent's last message.
                agent.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + RELEASE_TIMEOUT_S
        while (self._agents or self._replaced) and time.monotonic() < deadline:
            self.wait(deadline - time.monotonic())
            self.poll()

    def close(self) -> None:
        """Close all connections, and restore the terminal."""
        if self._line_is_live:
            self._write_terminal(f"{SHOW_CURSOR}\n")
        for agent in [*self._unidentified, *self._replaced, *self._agents.values()]:
            agent.close()
        self._replaced.clear()
        self._agents.clear()
        self._server.close()

    def clear_records(self) -> None:
        """Remove the records and error reports of an earlier run."""
        for path in [*self._run_dir.glob("workers/rank-*.json"), *self._run_dir.glob("errors/rank-*.txt")]:
            path.unlink(missing_ok=True)

    def all_connected(self) -> bool:
        """Return whether every worker has connected at least once."""
        return len(self._greetings) == self.size

    def agent_pids(self) -> set[int]:
        """Return the agents among this process's descendants; empty with several hosts."""
        return set() if self.multi_host else {greeting["agent_pid"] for greeting in self._greetings.values()}

    def wait(self, timeout_s: float) -> None:
        """Return when a message arrives, or after the time-out."""
        wait_readable(self._sources(), timeout_s)

    def poll(self) -> None:
        """Handle all messages that have arrived."""
        while readable := wait_readable(self._sources(), 0):
            for agent in [agent for agent in self._replaced if agent in readable and agent.receive() is None]:
                self._replaced.remove(agent)
                agent.close()
            identified = [(rank, agent) for rank, agent in self._agents.items() if agent in readable]
            for agent in [agent for agent in self._unidentified if agent in readable]:
                self._identify(agent)
            for rank, agent in identified:
                # A greeting just now may have replaced this agent.
                if self._agents.get(rank) is agent:
                    self._handle(rank, agent.receive())
            if self._server in readable:
                self._unidentified.append(MessageSocket(self._server.accept()[0]))

    def _sources(self) -> list[socket.socket | MessageSocket]:
        return [self._server, *self._unidentified, *self._replaced, *self._agents.values()]

    def unfinished(self) -> list[int]:
        """Return the ranks that have neither finished nor stopped on request."""
        return [rank for rank in range(self.size) if rank not in self._finished | self._stopped]

    def stopped(self) -> bool:
        """Return whether the job stopped on request: each rank stopped or finished, and at least one stopped."""
        return bool(self._stopped) and not self.unfinished()

    def failures(self) -> list[Failure]:
        """Return all failures known, the one to report first; those that follow from another are last."""
        return sorted(self._failures.values())

    def describe_rank(self, rank: int) -> str:
        """Name a rank in a message, with its host where there are several."""
        return f"rank {rank} on {self._greetings[rank]['host']}" if self.multi_host else f"rank {rank}"

    def _identify(self, agent: MessageSocket) -> None:
        """Accept a connection whose first message is a valid greeting, and close any other."""
        messages = agent.receive()
        if messages == []:
            return  # the first message is not complete yet
        self._unidentified.remove(agent)
        greeting, *rest = messages or [{}]
        rank, size = greeting.get("rank"), greeting.get("size")
        token = str(greeting.get("token")).encode(errors="replace")
        is_worker = secrets.compare_digest(token, self.rendezvous.token.encode())
        if not (is_worker and isinstance(rank, int) and isinstance(size, int) and 0 <= rank < size):
            agent.close()
            return
        if self._stopped or (self._forwarded is not None and rank in self._greetings):
            # The launcher mistook the stop, or a failure during it, for a failure that it has to handle, and has
            # started this worker again.
            self._replaced.append(agent)
            return
        # A launcher that restarts workers gives out their ranks again.
        self._resize(size)
        if rank in self._agents:
            # If its connection were closed, its agent would conclude that this launch is gone, and end the launcher.
            self._replaced.append(self._agents[rank])
        self._agents[rank], self._greetings[rank] = agent, greeting
        self._failures.pop(rank, None)
        self._finished.discard(rank)
        self._append_log(rank, "")
        if self._forwarded is not None:
            agent.send({"signal": self._forwarded})
        if rest:
            self._handle(rank, rest)

    def _resize(self, size: int) -> None:
        """Remove the ranks that no longer exist."""
        self.size = size
        self._replaced += [agent for rank, agent in self._agents.items() if rank >= size]
        for by_rank in (self._greetings, self._failures, self._agents):
            for rank in [rank for rank in by_rank if rank >= size]:
                del by_rank[rank]

    def _handle(self, rank: int, messages: list[dict[str, Any]] | None) -> None:
        if messages is None:
            self._agents.pop(rank).close()
            if rank not in self._finished | self._stopped:
                text = f"{self.describe_rank(rank)} was lost: its host ended, or the network to it was cut"
                self._failures.setdefault(rank, Failure(False, time.time(), rank, 1, text))
            return
        for message in messages:
            if "output" in message:
                self._print_output(rank, int(message["output"]), str(message.get("text", "")))
            elif "terminal" in message:
                self._write_terminal(str(message["terminal"]))
            elif "report" in message:
                self._failures[rank] = self._failure_from_report(rank, str(message["report"]))
            elif "wait_status" in message:
                self._handle_exit(rank, message)

    def _failure_from_report(self, rank: int, report: str) -> Failure:
        """Read an error report; with several hosts, whose clocks differ, its time is that of its arrival."""
        run_dir = Path() if self.multi_host else self._run_dir
        try:
            failure = failure_from_report(report, rank, error_file(run_dir, rank))
        except (ValueError, KeyError):
            excerpt = report[:REPORT_EXCERPT_CHARACTERS]
            text = f"{self.describe_rank(rank)} failed with an invalid error report: {excerpt!r}"
            return Failure(False, time.time(), rank, 1, text)
        failure = failure._replace(text=failure.text.replace(f"rank {rank}", self.describe_rank(rank), 1))
        return failure._replace(time=time.time()) if self.multi_host else failure

    def _print_output(self, rank: int, stream_number: int, text: str) -> None:
        """Print and log a worker's output; a closed terminal must not end the job."""
        prefix = f"[{rank}@{self._greetings[rank]['host']}] " if self.multi_host else f"[rank {rank}] "
        stream = sys.stderr if stream_number == 2 else sys.stdout
        if stream_number != LOG_ONLY:
            with contextlib.suppress(OSError, ValueError):
                stream.write(CLEAR_LINE if self._line_is_live and stream.isatty() else "")
                stream.write("".join(f"{prefix}{line}\n" for line in text.split("\n")))
                stream.flush()
            self._line_is_live = False
        self._append_log(rank, text + "\n")

    def _write_terminal(self, text: str) -> None:
        """Write rank 0's terminal output as it is; its last line may be a live one."""
        visible = CONTROL.sub(b"", text.encode())
        self._line_is_live = not visible.endswith(b"\n") if visible else self._line_is_live
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(text)
            sys.stdout.flush()

    def _append_log(self, rank: int, text: str) -> None:
        """Append to the rank's log, which exists from the worker's start; a full disk must not end the job."""
        with contextlib.suppress(OSError):
            path = log_file(self._run_dir, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as log:
                log.write(text)

    def _handle_exit(self, rank: int, message: dict[str, Any]) -> None:
        """Record how a worker ended, from its own record and its wait status."""
        code, state = os.waitstatus_to_exitcode(int(message["wait_status"])), message.get("state")
        # All ranks save before any exits, so one that its launcher killed after another had stopped has stopped too.
        if state == WorkerState.STOPPED or (self._stopped and -code in LAUNCHER_SIGNALS):
            self._stopped.add(rank)
            return
        ended_s = time.time() if self.multi_host else float(message["time"])
        failure = failure_from_exit(ended_s, rank, code, finished=state == WorkerState.FINISHED)
        if failure.code == 0:
            self._finished.add(rank)
        elif not (self._released and -code in LAUNCHER_SIGNALS):
            text = failure.text.replace(f"rank {rank}", self.describe_rank(rank))
            self._failures.setdefault(rank, failure._replace(text=text))
