"""Runs a launcher's command, follows its workers, and ends every process of the job when one fails."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dist_moe.launch.command import LAUNCH_VARIABLE, Command, LaunchError
from dist_moe.launch.hub import Hub
from dist_moe.launch.processes import Process, adopting_orphans, descendants, read_process, send
from dist_moe.launch.watch import Watch

LOOK_S = 0.1
# Until every worker has been seen: how one ended that dies before, and that its launcher collects, stays unknown.
FIRST_LOOK_S = 0.01
# After a worker has failed, the launcher has this long to end the others; DeepSpeed's looks once a second.
LAUNCHER_GRACE_S = 3.0
# After the last worker has finished its work, all have this long to leave.
FINISHED_GRACE_S = 30.0
# After SIGTERM, a worker has this long until SIGKILL.
WORKER_GRACE_S = 1.0


class Outcome(NamedTuple):
    """How a job ended: the exit code to leave with, and what to tell the user (empty if all went well)."""

    code: int
    message: str


def run(command: Command, run_dir: str | Path, workers: int, hub: Hub | None = None) -> Outcome:
    """Runs the job to its end; no process of it is left when this returns, on any host that can be reached.

    The launcher gets a session of its own, so Ctrl-C reaches this process alone, which then ends all others:
    launchers at once, since nothing of theirs is worth saving, and workers by SIGTERM, then SIGKILL. A job in
    which a worker fails is ended too, if its launcher has not done so within 3 s.

    run_dir: the run's folder, in which `dist_moe.comm.failure` writes; made if needed. hub: what the workers of other
    hosts connect to; None where all are on this one. Exit codes: 0 if every worker finished, 128 + N if signal N ended
    this job or the first worker that failed, else that worker's own. LaunchError if another job uses the folder. Call
    it from the main thread, which alone hears signals.
    """
    folder = Path(run_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_user(folder))
        received = stack.enter_context(heard_signals())
        stack.enter_context(adopting_orphans())
        others = set(descendants(os.getpid()))
        watch = hub or stack.enter_context(contextlib.closing(Watch(folder, workers)))
        watch.clear()
        launchers: list[subprocess.Popen[bytes]] = []
        # From the last to the first, each of them whatever another raises.
        stack.callback(end_all, launchers, watch, others, received)
        stack.callback(release, launchers)
        stack.callback(watch.let_go)
        for launcher in start(command, hub):
            launchers.append(launcher)
        code = follow(launchers, watch, received, command.restarts)
    if received:
        return Outcome(128 + received[0], f"stopped by {signal.Signals(received[0]).name}; every process has ended")
    return verdict(command, code, watch)


def start(command: Command, hub: Hub | None) -> Iterator[subprocess.Popen[bytes]]:
    """Starts each launcher in a session of its own, and names this process to it as DIST_MOE_LAUNCH.

    One that runs on another host has a pipe as its input, which is closed when this process ends.
    """
    me = read_process(os.getpid())
    assert me is not None
    environment = {**command.environment, LAUNCH_VARIABLE: str(hub.meeting) if hub else f"{me.pid}:{me.start_time}"}
    for argv in (command.argv, *command.beside):
        given = subprocess.PIPE if argv[0] == "ssh" else subprocess.DEVNULL
        yield subprocess.Popen(argv, env=environment, stdin=given, start_new_session=True)


def release(launchers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Closes the input of those on other hosts, at which they end."""
    for launcher in launchers:
        if launcher.stdin is not None:
            launcher.stdin.close()


def follow(
    launchers: Sequence[subprocess.Popen[bytes]], watch: Watch | Hub, received: list[int], restarts: bool
) -> int | None:
    """Waits for the launchers' end (the first code that is not 0), or for a signal or the end of a grace (None).

    restarts: a worker's failure is the launcher's to mend.
    """
    deadline: float | None = None
    while not received:
        codes = [launcher.poll() for launcher in launchers]
        watch.look()
        if None not in codes:
            return next((code for code in codes if code), 0)
        if deadline is None and not restarts and (grace_s := grace(watch, any(codes))) is not None:
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            return next((code for code in codes if code), None)
        watch.wait(LOOK_S if watch.complete() else FIRST_LOOK_S)
    return None


def grace(watch: Watch | Hub, failed: bool) -> float | None:
    """Seconds that a job may go on after a worker or one of several launchers has failed or all workers have finished.

    None before that.
    """
    failures = watch.failures()
    if failures:
        return 0.0 if failures[0].of_config else LAUNCHER_GRACE_S
    if failed:
        return LAUNCHER_GRACE_S
    return None if watch.unfinished() else FINISHED_GRACE_S


def end_all(
    launchers: Sequence[subprocess.Popen[bytes]], watch: Watch | Hub, others: Collection[int], received: list[int]
) -> None:
    """Ends all that descends from this process, but for `others`, and returns when nothing of it is left.

    A second signal from the user, or the end of the grace, turns SIGTERM into SIGKILL.
    """
    deadline = time.monotonic() + WORKER_GRACE_S
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
        patient = time.monotonic() < deadline and len(received) < 2
        for process in job:
            if not (patient and belongs(process, family, watch.pids())):
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


def verdict(command: Command, code: int | None, watch: Watch | Hub) -> Outcome:
    """What the launcher's return code (None: it was ended) and the workers' files say about the job."""
    failures = watch.failures()
    if failures:
        return Outcome(failures[0].code, failures[0].text)
    unfinished = ", ".join(map(str, watch.unfinished()))
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
def sole_user(folder: Path) -> Iterator[None]:
    """Holds the run's folder against another job; the kernel lets go when this process ends, in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "launch.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"run.dir={folder} is in use by a job that still runs; wait for it, end it, or set another run.dir"
            ) from None
        yield


@contextlib.contextmanager
def heard_signals() -> Iterator[list[int]]:
    """In the block, SIGINT, SIGTERM and SIGHUP end nothing, and are put into the list."""
    received: list[int] = []

    def hear(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    # A SIGHUP that is ignored comes from nohup, which means to go on after the terminal closes.
    heeded = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heeded.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, hear) for signum in heeded}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
