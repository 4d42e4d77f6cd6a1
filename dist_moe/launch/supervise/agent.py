"""Minds one worker on its host: its output, how it ends, and that it ends when the launch does.

A launch cannot see the processes of other hosts, nor ask how one ended that is not its child. So each worker is the
child of a small process, made before anything heavy is imported, that is connected to the launch: it sends what the
worker prints, reports its error and exit, passes the launch's signals on, and ends all that the worker left when either
of the two is gone. When the launch is gone it ends the launcher's own process on this host too, which may wait long for
hosts that it cannot reach any more.
"""

import codecs
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dist_moe.launch.supervise.first_failure import read_record
from dist_moe.launch.supervise.process_tree import Process, adopting_orphans, descendants, read_process, send
from dist_moe.launch.supervise.protocol import LOG_ALONE, MessageSocket, Rendezvous
from dist_moe.launch.supervise.pty import TERMINAL_VARIABLE, Transcript, open_terminal, read_terminal
from dist_moe.worker.contract import LAUNCH_VARIABLE

CONNECT_LIMIT_S = 10.0
LOOK_S = 0.1
# After SIGTERM, a worker has this long until SIGKILL.
GRACE_S = 1.0
# A worker's output may be held open by a process that it left behind.
DRAIN_S = 1.0
# As JSON a character may take six bytes, and a message has room for 2^20.
LONGEST_LINE = LONGEST_REPORT = 1 << 16
PR_SET_PDEATHSIG = 1
UNREACHABLE_CODE = 1


def mind(rendezvous: Rendezvous, rank: int, world_size: int, run_dir: Path) -> None:
    """Split this process in two: the worker, in which this returns, and its minder, which ends as the worker does.

    Call it before any thread starts. The worker's launch (DIST_MOE_LAUNCH) is the minder from here on.
    """
    launcher = launcher_of(os.getppid())
    for left in (run_dir / "errors" / f"rank-{rank}.txt", run_dir / "workers" / f"rank-{rank}.json"):
        with contextlib.suppress(OSError):  # which the worker tells better, as the first thing it does
            left.unlink(missing_ok=True)  # an earlier worker's, which would be taken for this one's
    try:
        connection = socket.create_connection(rendezvous[:2], timeout=CONNECT_LIMIT_S)
    except OSError as error:
        place = f"{rendezvous.address}, port {rendezvous.port}"
        sys.stderr.write(f"rank {rank} on {socket.gethostname()} cannot reach the launch at {place}: {error}\n")
        sys.stderr.flush()
        os._exit(UNREACHABLE_CODE)
    connection.settimeout(None)
    line = MessageSocket(connection)
    terminal = os.environ.pop(TERMINAL_VARIABLE, None)
    screen = open_terminal(terminal) if terminal and rank == 0 else None
    pipes = [screen or os.pipe(), os.pipe()]
    me = read_process(os.getpid())
    assert me is not None
    sys.stdout.flush()
    sys.stderr.flush()
    worker = os.fork()
    if worker == 0:
        line.close()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for target, (reading, writing) in enumerate(pipes, start=1):
            os.dup2(writing, target)
            os.close(reading)
            os.close(writing)
        os.environ[LAUNCH_VARIABLE] = f"{me.pid}:{me.start_time}"
        return
    for _, writing in pipes:
        os.close(writing)
    known = {"rank": rank, "size": world_size, "host": socket.gethostname(), "minder": me.pid}
    line.send({"word": rendezvous.word, **known})
    with adopting_orphans():
        Agent(line, worker, rank, run_dir, [reading for reading, _ in pipes], launcher, screen is not None).run()


def launcher_of(pid: int) -> Process | None:
    """The process if it is a launcher's, which has been told of the launch as its workers were; else None."""
    with contextlib.suppress(OSError):
        told = f"{LAUNCH_VARIABLE}={os.environ.get(LAUNCH_VARIABLE)}".encode()
        if told in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return read_process(pid)
    return None


class Agent:
    """The life of one worker, seen from beside it."""

    def __init__(
        self,
        line: MessageSocket,
        worker: int,
        rank: int,
        run_dir: Path,
        outputs: list[int],
        launcher: Process | None,
        draws: bool,
    ) -> None:
        self.line, self.worker, self.run_dir, self.rank, self.launcher = line, worker, run_dir, rank, launcher
        self.handle = os.pidfd_open(worker)
        # The worker's stdout and stderr -> 1 and 2, and what of a line has come.
        self.outputs = dict(zip(outputs, (LOG_ALONE if draws else 1, 2), strict=True))
        self.begun = {output: b"" for output in outputs}
        self.screen = outputs[0] if draws else None
        self.decoder, self.transcript = codecs.getincrementaldecoder("utf-8")("replace"), Transcript()
        self.told = False
        self.ending: float | None = None

    def run(self) -> NoReturn:
        """Until the worker has ended, and nothing of it is left; leaves with its exit code."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the worker too
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self._forward_signal)
        connected = True
        while not select.select([self.handle], [], [], 0)[0]:
            sources: list[int | MessageSocket] = [self.handle, *self.outputs, *([self.line] if connected else [])]
            ready = select.select(sources, [], [], LOOK_S)[0]
            self._copy([one for one in ready if isinstance(one, int)])
            self._report()
            if self.line in ready:
                connected = self._heed(self.line.receive())
            if self.ending is not None:
                self._end_all(time.monotonic() - self.ending > GRACE_S)
        status, ended_s = os.waitpid(self.worker, 0)[1], time.time()
        self._drain()
        self._report()
        while self._end_all(at_once=True):
            time.sleep(LOOK_S / 5)
        if self.ending is not None and self.launcher is not None:
            send(self.launcher, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        state = (read_record(self.run_dir, self.rank) or {}).get("state")
        self.line.send({"ended": status, "state": state, "time": ended_s})
        self.line.close()
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)

    def _heed(self, messages: list[dict[str, Any]] | None) -> bool:
        """Do what the launch says; False where it is gone."""
        if messages is None:
            self.ending = time.monotonic()
            if self.launcher is not None:
                send(self.launcher, signal.SIGTERM)
            return False
        for message in messages:
            self._forward_signal(int(message["signal"]))
        return True

    def _forward_signal(self, signum: int, frame: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signum)

    def _report(self) -> None:
        """Send the worker's error report as soon as it is written."""
        path = self.run_dir / "errors" / f"rank-{self.rank}.txt"
        if not self.told and path.is_file():
            self.told = True
            self.line.send({"report": path.read_text(encoding="utf-8", errors="replace")[:LONGEST_REPORT]})

    def _end_all(self, at_once: bool) -> bool:
        """Ask, or make, whatever descends from here to end; whether anything was there."""
        left = [process for process in descendants(os.getpid()).values() if not process.ended]
        for process in left:
            send(process, signal.SIGKILL if at_once else signal.SIGTERM)
        return bool(left)

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        while self.outputs and time.monotonic() < deadline:
            self._copy(select.select(list(self.outputs), [], [], LOOK_S)[0])
        for output in list(self.outputs):
            self._give_lines(output, end=True)

    def _copy(self, ready: list[int]) -> None:
        for output in ready:
            if output not in self.outputs:
                continue
            part = read_terminal(output)
            self.begun[output] += self._drawn(part) if output == self.screen else part
            self._give_lines(output, end=not part)
            if not part:
                os.close(output)
                del self.outputs[output], self.begun[output]

    def _drawn(self, part: bytes) -> bytes:
        """Send what is drawn on a terminal as it is -> the lines that its log gets."""
        self.line.send({"drawn": self.decoder.decode(part, final=not part)})
        return self.transcript.receive(part)

    def _give_lines(self, output: int, end: bool) -> None:
        """Send whole lines, and at the end, or where a line is too long for a message, what there is of one."""
        whole, newline, rest = self.begun[output].rpartition(b"\n")
        if end or len(rest) > LONGEST_LINE:
            whole, newline, rest = self.begun[output], b"", b""
        self.begun[output] = rest
        if whole or newline:
            self.line.send({"output": self.outputs[output], "text": whole.decode(errors="replace")})
