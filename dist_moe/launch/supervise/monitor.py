"""Monitors a job's workers through the connections that their agents, on any host, hold to this process."""

import contextlib
import itertools
import math
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dist_moe.launch.supervise.first_failure import Failure, failure_from_exit, failure_from_report
from dist_moe.launch.supervise.listener import Listener, raise_file_limit
from dist_moe.launch.supervise.output import JobOutput
from dist_moe.launch.supervise.protocol import (
    LOG_ONLY,
    Greeting,
    MessageSocket,
    Rendezvous,
    check_record,
    wait_readable,
)
from dist_moe.text import counted
from dist_moe.untrusted import printable
from dist_moe.worker.contract import WorkerState, error_file

RELEASE_TIMEOUT_S = 5.0
ROUND_S = 0.1
"""A round of `poll` ends after this time, also where more has arrived, so that a launch sees its signals."""
DRAIN_S = 0.5
REPORT_EXCERPT_CHARACTERS = 200
# What a launcher sends to the workers that still run when it sees that another has ended.
LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGKILL)


class WorkerMonitor:
    """The state of all workers, updated by `poll`. Close it after use.

    The workers' output is printed here, each line with its rank, and appended to a file per rank in `logs/` of the
    run's folder.

    Attributes:
        replaces_workers: The launcher may start a rank again, or continue with fewer workers. Under any other one, a
            second worker of a rank, or one of a job of another size, is refused.
        ends_by: Returns when the end of the job no longer waits, in seconds of the monotonic clock.

    Args:
        address: An address of this host that the workers can reach.
        size: Number of workers; a launcher that continues with fewer after it lost a host changes it.
        run_dir: The run's folder.
        multi_host: Workers may be on other hosts, so messages name the host, and agents end their workers.
    """

    def __init__(self, address: str, size: int, run_dir: Path, multi_host: bool = True) -> None:
        token = secrets.token_urlsafe(16)
        self.output = JobOutput(run_dir)
        if warning := raise_file_limit(size):
            self.output.announce(warning)
        self._listener = Listener(address, token)
        self.rendezvous = Rendezvous(address, self._listener.port, token)
        self.size = self._largest_size = size
        self.multi_host = multi_host
        self.replaces_workers = False
        self.ends_by: Callable[[], float] = lambda: math.inf
        self._run_dir = run_dir
        # Connections of workers whose rank another worker has by now.
        self._replaced: list[MessageSocket] = []
        self._agents: dict[int, MessageSocket] = {}
        self._greetings: dict[int, Greeting] = {}
        self._failures: dict[int, Failure] = {}
        self._finished: set[int] = set()
        self._stopped: set[int] = set()
        self._forwarded: int | None = None
        self._released = False
        self._next_rank = 0

    def __enter__(self) -> "WorkerMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward_signal(self, signum: int) -> None:
        """Send the signal to every worker, also to those that connect for the first time later."""
        self._forwarded = signum
        for agent in self._agents.values():
            agent.send({"signal": signum})

    def release_workers(self, limit_s: float = RELEASE_TIMEOUT_S) -> None:
        """Disconnect from the workers on other hosts, so that their agents end them, and wait for that.

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
        deadline = time.monotonic() + limit_s
        while (self._agents or self._replaced) and time.monotonic() < min(deadline, self.ends_by()):
            # A signal is handled after this time at the latest: the interrupted system call is repeated.
            self.wait(min(deadline - time.monotonic(), ROUND_S))
            self.poll()

    def close(self) -> None:
        """Close all connections, and restore the terminal."""
        for agent in [*self._replaced, *self._agents.values()]:
            agent.close()
        self._replaced.clear()
        self._agents.clear()
        self._listener.close()
        self.output.close(self.ends_by() - time.monotonic())

    def clear_records(self) -> None:
        """Remove the records and error reports of an earlier run."""
        for path in [*self._run_dir.glob("workers/rank-*.json"), *self._run_dir.glob("errors/rank-*.txt")]:
            path.unlink(missing_ok=True)

    def all_connected(self) -> bool:
        """Return whether every worker has connected at least once."""
        return len(self._greetings) == self.size

    def agent_pids(self) -> set[int]:
        """Return the agents among this process's descendants; empty with several hosts."""
        return set() if self.multi_host else {greeting.agent_pid for greeting in self._greetings.values()}

    def wait(self, timeout_s: float) -> None:
        """Return when a message arrives, or after the time-out."""
        wait_readable(self._sources(), timeout_s)

    def poll(self) -> bool:
        """Handle a part of each agent's messages, for at most about `ROUND_S`; return whether an agent sent any.

        Connections of strangers are polled too, and do not count.
        """
        readable = set(wait_readable(self._sources(), 0))
        for agent in [agent for agent in self._replaced if agent in readable and agent.receive() is None]:
            self._replaced.remove(agent)
            agent.close()
        handled = self._receive(readable)
        for agent, greeting, rest in self._listener.poll(readable):
            handled = True
            self._welcome(agent, greeting, rest)
        return handled

    def drain(self, limit_s: float = DRAIN_S) -> None:
        """Handle the last messages of the agents, for at most about `limit_s`."""
        deadline = time.monotonic() + limit_s
        while self.poll() and time.monotonic() < min(deadline, self.ends_by()):
            pass

    def _receive(self, readable: set[Any]) -> bool:
        """Handle what the agents have sent, in turns: a round that runs out of time is continued by the next one."""
        turns = sorted(rank for rank, agent in self._agents.items() if agent in readable)
        turns = [rank for rank in turns if rank >= self._next_rank] + [rank for rank in turns if rank < self._next_rank]
        deadline = time.monotonic() + ROUND_S
        for rank in turns:
            self._handle(rank, self._agents[rank].receive())
            self._next_rank = rank + 1
            if time.monotonic() > deadline:
                break
        return bool(turns)

    def _sources(self) -> list[socket.socket | MessageSocket]:
        return [*self._listener.sources(), *self._replaced, *self._agents.values()]

    def unfinished(self) -> list[int]:
        """Return the ranks that have neither finished nor stopped on request."""
        ended = self._finished | self._stopped
        return [rank for rank in range(self.size) if rank not in ended]

    def stopped(self) -> bool:
        """Return whether the job stopped on request: each rank stopped or finished, and at least one stopped."""
        return bool(self._stopped) and not self.unfinished()

    def failures(self) -> list[Failure]:
        """Return all failures known, the one to report first; those that follow from another are last."""
        return sorted(self._failures.values())

    def describe_rank(self, rank: int) -> str:
        """Name a rank in a message, with its host where there are several."""
        return f"rank {rank} on {self._greetings[rank].host}" if self.multi_host else f"rank {rank}"

    def _welcome(self, agent: MessageSocket, greeting: Greeting, rest: list[dict[str, Any]]) -> None:
        """Take an agent that knows the token for that of its rank, if there can be such a worker."""
        rank, size = greeting.rank, greeting.size
        if self._stopped or (self._forwarded is not None and rank in self._greetings):
            # The launcher mistook the stop, or a failure during it, for a failure that it has to handle, and has
            # started this worker again.
            self._replaced.append(agent)
            return
        fits = size <= self._largest_size if self.replaces_workers else size == self.size
        if not fits or (rank in self._greetings and not self.replaces_workers):
            what = f"rank {rank} of {size} on {greeting.host}"
            self.output.announce(f"refused a worker that says it is {what}, in a job of {counted(self.size, 'worker')}")
            agent.close()
            return
        # A launcher that restarts workers gives out their ranks again.
        self._resize(size)
        if rank in self._agents:
            # If its connection were closed, its agent would conclude that this launch is gone, and end the launcher.
            self._replaced.append(self._agents[rank])
        self._agents[rank], self._greetings[rank] = agent, greeting
        self._failures.pop(rank, None)
        self._finished.discard(rank)
        self.output.log(rank, "")
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
            if rank not in self._finished and rank not in self._stopped:
                text = f"{self.describe_rank(rank)} was lost: its host ended, or the network to it was cut"
                self._failures.setdefault(rank, Failure(False, time.time(), rank, 1, text))
            return
        valid = list(itertools.takewhile(lambda message: not check_record(message), messages))
        logged = [f"{message['text']}\n" for message in valid if "output" in message]
        # Lines of one stream are written together: a worker may send thousands of short ones at a time.
        for stream, group in itertools.groupby(valid, lambda message: message.get("output")):
            if stream is None:
                self._handle_records(rank, group)
            elif stream != LOG_ONLY:
                self.output.lines(stream, self._prefix(rank), "\n".join(message["text"] for message in group))
        if logged:
            self.output.log(rank, "".join(logged))
        if len(valid) < len(messages):
            fault = printable(check_record(messages[len(valid)]))
            text = f"{self.describe_rank(rank)} sent {fault}; install the same dist-moe on every host"
            self._failures.setdefault(rank, Failure(False, time.time(), rank, 1, text))
            self._agents.pop(rank).close()

    def _handle_records(self, rank: int, messages: Iterable[dict[str, Any]]) -> None:
        """Handle valid records that are no lines of output."""
        messages = list(messages)
        if rank == 0 and (shown := "".join(message.get("terminal", "") for message in messages)):
            self.output.terminal(shown)
        for message in messages:
            if "report" in message:
                self._failures[rank] = self._failure_from_report(rank, message["report"])
            elif "wait_status" in message:
                self._handle_exit(rank, message)

    def _failure_from_report(self, rank: int, report: str) -> Failure:
        """Read an error report; with several hosts, whose clocks differ, its time is that of its arrival."""
        run_dir = Path() if self.multi_host else self._run_dir
        try:
            failure = failure_from_report(report, rank, error_file(run_dir, rank))
        except (ValueError, KeyError, OverflowError, RecursionError):
            excerpt = report[:REPORT_EXCERPT_CHARACTERS]
            text = f"{self.describe_rank(rank)} failed with an invalid error report: {excerpt!r}"
            return Failure(False, time.time(), rank, 1, text)
        failure = failure._replace(text=failure.text.replace(f"rank {rank}", self.describe_rank(rank), 1))
        return failure._replace(time=time.time()) if self.multi_host else failure

    def _prefix(self, rank: int) -> str:
        return f"[{rank}@{self._greetings[rank].host}] " if self.multi_host else f"[rank {rank}] "

    def _handle_exit(self, rank: int, message: dict[str, Any]) -> None:
        """Record how a worker ended, from its own record and its wait status."""
        code, state = os.waitstatus_to_exitcode(message["wait_status"]), message.get("state")
        # All ranks save before any exits, so one that its launcher killed after another had stopped has stopped too.
        if state == WorkerState.STOPPED or (self._stopped and -code in LAUNCHER_SIGNALS):
            self._stopped.add(rank)
            return
        ended_s = time.time() if self.multi_host else float(message.get("time", time.time()))
        failure = failure_from_exit(ended_s, rank, code, finished=state == WorkerState.FINISHED)
        if failure.code == 0:
            self._finished.add(rank)
        elif not (self._released and -code in LAUNCHER_SIGNALS):
            text = failure.text.replace(f"rank {rank}", self.describe_rank(rank))
            self._failures.setdefault(rank, failure._replace(text=text))
