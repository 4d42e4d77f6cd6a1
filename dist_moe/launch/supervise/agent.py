"""Supervises one worker on its host: forwards its output and its end to the launch, and ends it with the launch.

A launch cannot see the processes of other hosts, nor get the exit status of a process that is not its child. So each
worker is the child of a small process, forked before anything heavy is imported, that is connected to the launch. This
agent sends what the worker prints, its error report and its exit status, forwards the launch's signals, and ends every
process that the worker left behind when either of the two is gone. When the launch is gone it also ends the launcher's
own process on this host, which may wait long for hosts that it cannot reach any more.
"""

import codecs
import contextlib
import ctypes
import functools
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from dist_moe.launch.supervise.process_tree import adopt_orphans, descendants, send_signal
from dist_moe.launch.supervise.protocol import LOG_ONLY, MessageSocket, Rendezvous
from dist_moe.launch.supervise.pty import TERMINAL_VARIABLE, Transcript, open_terminal, read_terminal
from dist_moe.worker.contract import (
    LAUNCH_FILE_VARIABLE,
    LAUNCH_VARIABLE,
    NOTICE_VARIABLE,
    error_file,
    process_identity,
    read_state,
    record_file,
)
from dist_moe.worker.shared_storage import try_again

CONNECT_TIMEOUT_S = 10.0
# Strangers who connect to the launch without end may keep it from a connection for some time.
CONNECT_LIMIT_S = 60.0
RETRY_S = 0.2
POLL_S = 0.1
# After SIGTERM, a worker has this long until SIGKILL.
GRACE_S = 1.0
# A worker's output may be held open by a process that it left behind.
DRAIN_S = 1.0
# JSON may need six bytes for a character, and a message has at most 2^20 bytes.
MAX_LINE_BYTES = MAX_REPORT_CHARACTERS = 1 << 16
PR_SET_PDEATHSIG = 1
UNREACHABLE_CODE = 1


def fork_worker(rendezvous: Rendezvous, rank: int, world_size: int, run_dir: Path) -> None:
    """Split this process in two: the worker, in which this returns, and its agent, which exits when the worker does.

    Call it before any thread starts. In the worker, DIST_MOE_LAUNCH names the agent from here on.

    Args:
        rendezvous: Where the launch listens. The process exits with code 1 if it cannot connect.
        rank: The worker's rank.
        world_size: Number of workers of the job.
        run_dir: The run's folder.
    """
    launcher = launcher_process(os.getppid())
    for stale in (error_file(run_dir, rank), record_file(run_dir, rank)):
        # Files of an earlier worker of this rank, which the agent would take for this worker's. If the folder cannot
        # be written, the worker itself reports it.
        with contextlib.suppress(OSError):
            try_again(functools.partial(stale.unlink, missing_ok=True))
    greeting = {"rank": rank, "size": world_size, "host": socket.gethostname(), "agent_pid": os.getpid()}
    try:
        launch = connect(rendezvous, greeting)
    except OSError as error:
        endpoint = f"{rendezvous.address}, port {rendezvous.port}"
        sys.stderr.write(f"rank {rank} on {socket.gethostname()} cannot reach the launch at {endpoint}: {error}\n")
        sys.stderr.flush()
        os._exit(UNREACHABLE_CODE)
    terminal_size = os.environ.pop(TERMINAL_VARIABLE, None)
    terminal = open_terminal(terminal_size) if terminal_size and rank == 0 else None
    pipes = [terminal or os.pipe(), os.pipe()]
    notice, notify = os.pipe()
    agent_identity = process_identity(os.getpid())
    # What is still buffered would be written by both processes.
    sys.stdout.flush()
    sys.stderr.flush()
    worker_pid = os.fork()
    if worker_pid == 0:
        launch.close()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for stream, (reading, writing) in enumerate(pipes, start=1):
            os.dup2(writing, stream)
            os.close(reading)
            os.close(writing)
        os.close(notice)
        os.environ[LAUNCH_VARIABLE], os.environ[NOTICE_VARIABLE] = agent_identity, str(notify)
        return
    for writing in (*(writing for _, writing in pipes), notify):
        os.close(writing)
    outputs = [reading for reading, _ in pipes]
    with adopt_orphans():
        Agent(launch, worker_pid, rank, run_dir, outputs, notice, launcher, terminal is not None).run()


def connect(rendezvous: Rendezvous, greeting: dict[str, Any], limit_s: float = CONNECT_LIMIT_S) -> MessageSocket:
    """Connect to the launch and send the greeting, and try again where that fails, as long as the launch may be there.

    Nothing happens between the two: a launch with too many connections closes those that have been silent longest.

    Args:
        rendezvous: Where the launch listens.
        greeting: Its fields, without the token.
        limit_s: How long to try. Where nothing listens, or no route leads there, it tries once.

    Raises:
        OSError: It cannot be reached.
    """
    began = time.monotonic()
    line = {"token": rendezvous.token, **greeting}
    while True:
        try:
            connection = socket.create_connection(rendezvous[:2], timeout=CONNECT_TIMEOUT_S)
            connection.settimeout(None)
            launch = MessageSocket(connection)
            if launch.send(line):
                return launch
            raise ConnectionResetError("it closed the connection")
        except OSError as error:
            listens = isinstance(error, (TimeoutError, ConnectionResetError))
            if time.monotonic() - began > (limit_s if listens else 0.0):
                raise
            time.sleep(RETRY_S)


def launcher_process(pid: int) -> psutil.Process | None:
    """Return the process if it is a launcher of the same launch, which has the same DIST_MOE_LAUNCH; else None."""
    launch = {os.environ.get(LAUNCH_VARIABLE), os.environ.get(LAUNCH_FILE_VARIABLE)} - {None}
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.environ().get(LAUNCH_VARIABLE) in launch:
            return process
    return None


class Agent:
    """Supervises one worker, its child.

    Args:
        launch: Connection to the launch.
        worker_pid: The worker.
        rank: Its rank.
        run_dir: The run's folder.
        outputs: File descriptors with the worker's stdout and stderr.
        notice: A file descriptor that can be read once the worker has written an error report, or has ended.
        launcher: The launcher's process on this host, if it is the parent.
        has_terminal: The worker's stdout is a pseudo-terminal.
    """

    def __init__(
        self,
        launch: MessageSocket,
        worker_pid: int,
        rank: int,
        run_dir: Path,
        outputs: list[int],
        notice: int,
        launcher: psutil.Process | None,
        has_terminal: bool,
    ) -> None:
        self.launch, self.launcher = launch, launcher
        self.worker_pid, self.rank, self.run_dir = worker_pid, rank, run_dir
        self.handle = os.pidfd_open(worker_pid)
        # File descriptor -> number of the stream, and the start of a line that is not complete yet.
        self.streams = dict(zip(outputs, (LOG_ONLY if has_terminal else 1, 2), strict=True))
        self.partial_lines = {output: b"" for output in outputs}
        self.terminal = outputs[0] if has_terminal else None
        self.decoder, self.transcript = codecs.getincrementaldecoder("utf-8")("replace"), Transcript()
        self.notice: int | None = notice
        self.report_sent = False
        # When the launch was gone, in seconds of the monotonic clock.
        self.launch_lost_s: float | None = None

    def run(self) -> NoReturn:
        """Supervise until the worker has ended and none of its processes is left; exit with its exit code."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the worker too
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self._forward_signal)
        connected = True
        while not select.select([self.handle], [], [], 0)[0]:
            sources: list[int | MessageSocket] = [self.handle, *self.streams, *([self.launch] if connected else [])]
            sources += [] if self.notice is None else [self.notice]
            readable = select.select(sources, [], [], None if self.launch_lost_s is None else POLL_S)[0]
            self._copy_output([source for source in readable if isinstance(source, int)])
            if self.notice is not None and self.notice in readable:
                os.close(self.notice)
                self.notice = None
                self._send_report()
            if self.launch in readable:
                connected = self._handle(self.launch.receive())
            if self.launch_lost_s is not None:
                self._end_descendants(kill=time.monotonic() - self.launch_lost_s > GRACE_S)
        status, ended_s = os.waitpid(self.worker_pid, 0)[1], time.time()
        self._drain_output()
        if not self.report_sent:
            self._send_report()
        while self._end_descendants(kill=True):
            time.sleep(POLL_S / 5)
        if self.launch_lost_s is not None and self.launcher is not None:
            send_signal(self.launcher, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        self.launch.send({"wait_status": status, "state": self._state(), "time": ended_s})
        self.launch.close()
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)

    def _handle(self, messages: list[dict[str, Any]] | None) -> bool:
        """Forward the signals that the launch sends; return whether it is still connected."""
        if messages is None:
            self.launch_lost_s = time.monotonic()
            if self.launcher is not None:
                send_signal(self.launcher, signal.SIGTERM)
            return False
        for message in messages:
            self._forward_signal(int(message["signal"]))
        return True

    def _forward_signal(self, signum: int, frame: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signum)

    def _send_report(self) -> None:
        """Send the worker's error report, which is written before the worker says so, or before it ends.

        The file may be on shared storage: it is looked for once, not polled.
        """
        with contextlib.suppress(OSError):  # there is none, or the storage is gone
            content = try_again(error_file(self.run_dir, self.rank).read_bytes)
            self.report_sent = True
            self.launch.send({"report": content.decode(errors="replace")[:MAX_REPORT_CHARACTERS]})

    def _state(self) -> str | None:
        """Return the state in the worker's record; None where it cannot be read, as after a power failure."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return try_again(lambda: read_state(self.run_dir, self.rank))
        return None

    def _end_descendants(self, kill: bool) -> bool:
        """Send SIGTERM or SIGKILL to every running descendant, and return whether there was one."""
        running = [entry.process for entry in descendants(os.getpid()).values() if not entry.ended]
        for process in running:
            send_signal(process, signal.SIGKILL if kill else signal.SIGTERM)
        return bool(running)

    def _drain_output(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        while self.streams and time.monotonic() < deadline:
            self._copy_output(select.select(list(self.streams), [], [], POLL_S)[0])
        for output in list(self.streams):
            self._send_lines(output, flush=True)

    def _copy_output(self, readable: list[int]) -> None:
        for output in readable:
            if output not in self.streams:
                continue
            part = read_terminal(output)
            self.partial_lines[output] += self._send_terminal(part) if output == self.terminal else part
            self._send_lines(output, flush=not part)
            if not part:
                os.close(output)
                del self.streams[output], self.partial_lines[output]

    def _send_terminal(self, part: bytes) -> bytes:
        """Send terminal output as it is, and return the lines for the log."""
        self.launch.send({"terminal": self.decoder.decode(part, final=not part)})
        return self.transcript.feed(part)

    def _send_lines(self, output: int, flush: bool) -> None:
        """Send complete lines; an incomplete one only with `flush`, or where it is too long for a message."""
        complete, newline, rest = self.partial_lines[output].rpartition(b"\n")
        if flush or len(rest) > MAX_LINE_BYTES:
            complete, newline, rest = self.partial_lines[output], b"", b""
        self.partial_lines[output] = rest
        if complete or newline:
            self.launch.send({"output": self.streams[output], "text": complete.decode(errors="replace")})
