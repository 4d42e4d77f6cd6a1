"""Runs a launcher's command, follows its workers, and ends every process of the job when one fails or stops."""

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dist_moe.errors import needs_folder
from dist_moe.launch.command import Command, LaunchError
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.process_tree import Process, adopting_orphans, descendants, send
from dist_moe.launch.supervise.pty import terminal_environment
from dist_moe.worker.contract import LAUNCH_VARIABLE, STOPPED_CODE

LOOK_S = 0.1
# After a worker has failed, the launcher has this long to end the others; DeepSpeed's looks once a second.
LAUNCHER_GRACE_S = 3.0
# After the last worker has finished its work, all have this long to leave.
FINISHED_GRACE_S = 30.0
# After SIGTERM, a worker has this long until SIGKILL.
WORKER_GRACE_S = 1.0
# After a request to stop, the workers have this long for the step that they are in and for a checkpoint.
STOP_LIMIT_S = 1800.0
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Outcome(NamedTuple):
    """How a job ended: the exit code to leave with, and what to tell the user (empty if all went well)."""

    code: int
    message: str


class End(NamedTuple):
    """How following a job ended.

    code: the first of its launchers' that is not 0, or None if it has to be ended. signum: the signal that it is ended
    for, or None.
    """

    code: int | None
    signum: int | None = None


def run(command: Command, run_dir: str | Path, monitor: WorkerMonitor) -> Outcome:
    """Runs the job to its end; no process of it is left when this returns, on any host that can be reached.

    The launcher gets a session of its own, so Ctrl-C reaches this process alone, which then ends all others:
    launchers at once, since nothing of theirs is worth saving, and workers by SIGTERM, then SIGKILL. A job in
    which a worker fails is ended too, if its launcher has not done so within 3 s. SIGUSR1 and the first SIGTERM are
    passed on to the workers, which save a checkpoint and stop; before all of them are there they end the job at once.

    run_dir: the run's folder, in which `dist_moe.worker.exit` writes; made if needed. hub: what the workers' minders
    connect to. Exit codes: 0 if every worker finished, 75 if they stopped on request, 128 + N if signal N ended this
    job or the first worker that failed, else that worker's own. LaunchError if another job uses the folder. Call it
    from the main thread, which alone hears signals.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_dir_lock(Path(run_dir)))
        received = stack.enter_context(capture_signals())
        stack.enter_context(adopting_orphans())
        others = set(descendants(os.getpid()))
        monitor.clear()
        launchers: list[subprocess.Popen[bytes]] = []
        # From the last to the first, each of them whatever another raises.
        stack.callback(monitor.poll)  # for the workers' last words
        stack.callback(end_all, launchers, monitor, others, received)
        stack.callback(release, launchers)
        stack.callback(monitor.release_workers)
        for launcher in start(command, monitor):
            launchers.append(launcher)
        end = follow(launchers, monitor, received, command.restarts)
    return verdict(command, end, monitor, received)


def start(command: Command, monitor: WorkerMonitor) -> Iterator[subprocess.Popen[bytes]]:
    """Starts each launcher in a session of its own; its environment names the meeting, and the terminal to draw on.

    One that runs on another host has a pipe as its input, which is closed when this process ends.
    """
    drawn = {} if monitor.apart else terminal_environment(sys.stdout)
    environment = {**command.environment, **drawn, LAUNCH_VARIABLE: str(monitor.rendezvous)}
    for argv in (command.argv, *command.remote_commands):
        given = subprocess.PIPE if argv[0] == "ssh" else subprocess.DEVNULL
        yield subprocess.Popen(argv, env=environment, stdin=given, start_new_session=True)


def release(launchers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Closes the input of those on other hosts, at which they end."""
    for launcher in launchers:
        if launcher.stdin is not None:
            launcher.stdin.close()


def follow(
    launchers: Sequence[subprocess.Popen[bytes]], monitor: WorkerMonitor, received: list[int], restarts: bool
) -> End:
    """Waits for the launchers' end, the end of a grace, or a signal that ends the job; passes the others on.

    restarts: a worker's failure is the launcher's to mend.
    """
    deadline, passed_on = math.inf, 0
    while (signum := ends_at_once(received)) is None:
        codes = [launcher.poll() for launcher in launchers]
        monitor.poll()
        if None not in codes:
            return End(next((code for code in codes if code), 0))
        if len(received) > passed_on:
            passed_on = len(received)
            if not monitor.complete():
                break  # no worker has anything to save yet
            monitor.forward_signal(received[-1])
            deadline = min(deadline, time.monotonic() + STOP_LIMIT_S)
        deadline = min(deadline, time.monotonic() + grace_s(monitor, any(codes), restarts, bool(received)))
        if time.monotonic() > deadline:
            late = bool(received) and bool(monitor.unfinished()) and not monitor.failures()
            return End(next((code for code in codes if code), None), received[0] if late else None)
        monitor.wait(LOOK_S)
    return End(None, received[0] if signum is None else signum)


def grace_s(monitor: WorkerMonitor, failed: bool, restarts: bool, asked: bool) -> float:
    """How long a job may go on after a worker or one of several launchers has failed, or all workers have left.

    Infinite before that. asked: the workers are to stop, so none that fails is started again.
    """
    if monitor.stopped():
        # A launcher that restarts workers takes a stop for a failure.
        return 0.0 if restarts else LAUNCHER_GRACE_S
    if restarts and not asked:
        return math.inf
    if failures := monitor.failures():
        return 0.0 if failures[0].of_config else LAUNCHER_GRACE_S
    if failed and not restarts:
        return LAUNCHER_GRACE_S
    return math.inf if monitor.unfinished() else FINISHED_GRACE_S


def ends_at_once(received: Sequence[int]) -> int | None:
    """The signal among these that ends the job at once, if one does: any but the first requests to stop."""
    hasty = [signum for signum in received if signum not in STOP_SIGNALS]
    if hasty:
        return hasty[0]
    return signal.SIGTERM if received.count(signal.SIGTERM) > 1 else None


def end_all(
    launchers: Sequence[subprocess.Popen[bytes]], monitor: WorkerMonitor, others: Collection[int], received: list[int]
) -> None:
    """Ends all that descends from this process, but for `others`, and returns when nothing of it is left.

    Another signal from the user, or the end of the grace, turns SIGTERM into SIGKILL.
    """
    deadline, heard = time.monotonic() + WORKER_GRACE_S, len(received)
    told: set[tuple[int, int]] = set()
    ours = {launcher.pid for launcher in launchers}
    while True:
        for launcher in launchers:
            launcher.poll()
        family = descendants(os.getpid())
        job = [process for process in family.values() if not belongs(process, family, others)]
        collect([process for process in job if process.pid not in ours])
        if not job:
            return
        patient = time.monotonic() < deadline and len(received) == heard
        for process in job:
            if not (patient and belongs(process, family, monitor.pids())):
                send(process, signal.SIGKILL)
            elif (process.pid, process.start_time) not in told:
                told.add((process.pid, process.start_time))
                send(process, signal.SIGTERM)
        time.sleep(LOOK_S / 5)


def collect(processes: list[Process]) -> None:
    """Asks how adopted children ended, so that the kernel forgets them; those that live stay."""
    for process in processes:
        if process.ended and process.parent == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def belongs(process: Process, family: dict[int, Process], roots: Collection[int]) -> bool:
    """Whether the process is one of `roots` (pids), or descends from one."""
    member: Process | None = process
    while member is not None and member.pid not in roots:
        member = family.get(member.parent)
    return member is not None


def verdict(command: Command, end: End, monitor: WorkerMonitor, received: Sequence[int]) -> Outcome:
    """What the end of the launcher, the user's signals and the workers' ends say about the job."""
    failures = monitor.failures()
    # What a worker does that cannot stop yet.
    died = next((signum for signum in received if any(one.code == 128 + signum for one in failures)), None)
    signum = died if end.signum is None else end.signum
    if signum is not None:
        return Outcome(128 + signum, f"stopped by {signal.Signals(signum).name}; every process has ended")
    if failures:
        return Outcome(failures[0].code, failures[0].text)
    if monitor.stopped():
        by = f" ({signal.Signals(received[0]).name})" if received else ""
        told = f"stopped on request{by}: every rank saved its checkpoint; start it again to go on"
        return Outcome(STOPPED_CODE, told)
    code = end.code
    unfinished = ", ".join(map(str, monitor.unfinished()))
    if code is None:
        how = f"and was ended after {FINISHED_GRACE_S:g} s"
        return Outcome(0, f"every rank finished, but the {command.launcher} launcher did not end, {how}")
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    passed_on = 128 - code if code < 0 else code
    if unfinished:
        told = f"the {command.launcher} launcher {how} before rank {unfinished} finished or reported an error"
        return Outcome(passed_on or 1, f"{told}; see the output above")
    told = f"every rank finished, but the {command.launcher} launcher {how}; see the output above"
    # A launcher that went on without a host that it lost is not to blame for that host.
    return Outcome(0 if command.restarts else passed_on, told if passed_on else "")


@contextlib.contextmanager
def run_dir_lock(folder: Path) -> Iterator[None]:
    """Holds the run's folder against another job; the kernel lets go when this process ends, in any way."""
    with needs_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "launch.lock").open("w")
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"run.dir={folder} is in use by a job that still runs; wait for it, end it, or set another run.dir"
            ) from None
        yield


@contextlib.contextmanager
def capture_signals() -> Iterator[list[int]]:
    """In the block, SIGINT, SIGTERM, SIGHUP and SIGUSR1 end nothing, and are put into the list."""
    received: list[int] = []

    def hear(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    # A SIGHUP that is ignored comes from nohup, which means to go on after the terminal closes.
    heeded = [signal.SIGINT, *STOP_SIGNALS]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heeded.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, hear) for signum in heeded}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
