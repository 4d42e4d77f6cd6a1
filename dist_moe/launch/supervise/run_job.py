"""Runs a launcher's command, monitors its workers, and ends every process of the job when one fails or stops."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from dist_moe.launch.command import Command
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.process_tree import Descendant, adopt_orphans, descendants, send_signal
from dist_moe.launch.supervise.pty import terminal_environment
from dist_moe.launch.supervise.remote_exec import pipe_size, send_line, variables_line
from dist_moe.launch.supervise.secret_file import kept_on_hosts
from dist_moe.worker.contract import LAUNCH_VARIABLE, STOP_SIGNALS, STOPPED_CODE
from dist_moe.worker.run_lock import lock_for_launch
from dist_moe.worker.signals import capture_signals

POLL_S = 0.1
# After a worker has failed, the launcher has this long to end the others; DeepSpeed's polls once a second.
LAUNCHER_GRACE_S = 3.0
# After the last worker has finished its work, all processes have this long to exit.
FINISHED_GRACE_S = 30.0
# After SIGTERM, a worker has this long until SIGKILL.
WORKER_GRACE_S = 1.0
# After the launchers have ended, what their workers have sent is read for this time.
LAST_MESSAGES_S = 5.0
# After the signal that ends the job at once, nothing waits any longer than this, all together.
HURRIED_END_S = 1.4
# After a request to stop, the workers have this long to finish their step and save a checkpoint.
STOP_TIMEOUT_S = 1800.0
# Ctrl-C asks for a stop as SIGTERM does, which workers that do not train yet die from at once.
FORWARDED_AS: dict[int, int] = {signal.SIGINT: signal.SIGTERM}


class JobOutcome(NamedTuple):
    """How a job ended.

    Attributes:
        code: Exit code for the launch.
        message: What to print for the user; empty after success.
    """

    code: int
    message: str


class JobEnd(NamedTuple):
    """Why `wait_for_end` returned.

    Attributes:
        code: The first exit code of the launchers that is not 0 (0 if all are), or None if one still runs.
        signum: The signal for which the job has to be ended, or None.
    """

    code: int | None
    signum: int | None = None


def run(command: Command, run_dir: str | Path, monitor: WorkerMonitor) -> JobOutcome:
    """Run a job to its end; when this returns, no process of it is left on any host that can be reached.

    The launcher runs in a session of its own, so Ctrl-C reaches this process alone. SIGUSR1, the first SIGTERM and the
    first Ctrl-C are requests to stop: they are forwarded to the workers, which save a checkpoint and exit; before all
    workers have connected they end the job at once. A second SIGTERM or Ctrl-C, and SIGHUP, end it: launchers by
    SIGKILL, as they have nothing to save, and workers by SIGTERM, then SIGKILL. If a worker fails and the launcher does
    not end the job within 3 s, this process does.

    Call it from the main thread, which alone receives signals.

    Args:
        command: The launcher's command.
        run_dir: The run's folder, in which workers write their records; created if needed.
        monitor: Where the workers' agents connect.

    Returns:
        The exit code is 0 if every worker finished, 75 if they stopped on request, 128 + N if signal N ended this job
        or the first worker that failed, otherwise that worker's own exit code.

    Raises:
        RunInUseError: Another job uses the folder.
        RunFolderError: The folder cannot be written.
        UserError: A host does not keep the variables of its workers.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_for_launch(Path(run_dir)))
        monitor.replaces_workers = command.replaces_workers
        received = stack.enter_context(capture_signals(captured_signals()))
        monitor.ends_by = ends_by = HurriedEnd(received).ends_by
        stack.enter_context(adopt_orphans())
        monitor.clear_records()
        launchers: list[subprocess.Popen[bytes]] = []
        stack.enter_context(command.written())
        if command.held_variables:
            kept = kept_on_hosts(command.holders, command.held_variables, lambda: bool(received), ends_by)
            stack.enter_context(kept)
        if received:
            # No worker exists yet.
            return outcome_of(command, JobEnd(None, received[0]), monitor, received)
        unrelated = set(descendants(os.getpid()))
        # Called from the last to the first, each of them also after an exception in another.
        stack.callback(monitor.drain)
        stack.callback(end_processes, launchers, monitor, unrelated, received)
        stack.callback(close_inputs, launchers)
        stack.callback(monitor.release_workers)
        for launcher in start_launchers(command, monitor):
            launchers.append(launcher)
        end = wait_for_end(launchers, monitor, received, command.restarts)
    return outcome_of(command, end, monitor, received)


class HurriedEnd:
    """When the waits at the end of a job are over, once a signal ends it at once: one deadline for all of them.

    Args:
        received: The signals that this process has received; it grows.
    """

    def __init__(self, received: Sequence[int]) -> None:
        self._received = received
        self._deadline = math.inf

    def ends_by(self) -> float:
        """Return the time, in seconds of the monotonic clock; infinite without such a signal."""
        if self._deadline == math.inf and ending_signal(self._received) is not None:
            self._deadline = time.monotonic() + HURRIED_END_S
        return self._deadline


def captured_signals() -> list[signal.Signals]:
    """Return the signals that end a job or request it to stop; without SIGHUP below nohup, which ignores it."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, *STOP_SIGNALS, *hangup]


def start_launchers(command: Command, monitor: WorkerMonitor) -> Iterator[subprocess.Popen[bytes]]:
    """Start each launcher in a session of its own, with the rendezvous and the terminal in its environment.

    One that runs on another host gets a pipe as its stdin: it ends when the pipe closes, as it does with this process.
    """
    terminal = {} if monitor.multi_host else terminal_environment(sys.stdout)
    environment = {**command.environment, **terminal, LAUNCH_VARIABLE: str(monitor.rendezvous)}
    for argv, variables in command.processes():
        stdin = subprocess.DEVNULL if variables is None else subprocess.PIPE
        line = b"" if variables is None else variables_line(variables)
        launcher = subprocess.Popen(
            argv, env=environment, stdin=stdin, start_new_session=True, pipesize=pipe_size(line)
        )
        yield launcher
        if line:
            send_line(launcher, line)


def close_inputs(launchers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Close the stdin of the launchers on other hosts, which ends them."""
    for launcher in launchers:
        if launcher.stdin is not None:
            launcher.stdin.close()


def wait_for_end(
    launchers: Sequence[subprocess.Popen[bytes]], monitor: WorkerMonitor, received: Sequence[int], restarts: bool
) -> JobEnd:
    """Wait until the launchers exit, a grace period is over, or a signal ends the job; forward requests to stop.

    Args:
        launchers: The launchers' processes.
        monitor: The state of the workers.
        received: The signals that this process has received; it grows.
        restarts: The launcher restarts workers that fail.
    """
    deadline, handled = math.inf, 0
    while (signum := ending_signal(received)) is None:
        codes = [launcher.poll() for launcher in launchers]
        monitor.poll()
        if None not in codes:
            monitor.drain(LAST_MESSAGES_S)
            return JobEnd(next((code for code in codes if code), 0))
        if len(received) > handled:
            handled = len(received)
            if not monitor.all_connected():
                break  # no worker has anything to save yet
            monitor.forward_signal(FORWARDED_AS.get(received[-1], received[-1]))
            monitor.output.announce(acknowledgement(received[-1]))
            deadline = min(deadline, time.monotonic() + STOP_TIMEOUT_S)
        grace_s = grace_period_s(monitor, any(codes), restarts, stop_requested=bool(received))
        deadline = min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            ignored_stop = bool(received) and bool(monitor.unfinished()) and not monitor.failures()
            return JobEnd(next((code for code in codes if code), None), received[0] if ignored_stop else None)
        monitor.wait(POLL_S)
    return JobEnd(None, received[0] if signum is None else signum)


def acknowledgement(signum: int) -> str:
    """Return the line that says what a request to stop does."""
    name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
    return f"{name}: the workers finish their step, save a checkpoint and stop; Ctrl-C again ends them at once"


def grace_period_s(monitor: WorkerMonitor, launcher_failed: bool, restarts: bool, stop_requested: bool) -> float:
    """Return how long the job may still run; infinite while no worker or launcher has failed and some worker runs.

    Args:
        monitor: The state of the workers.
        launcher_failed: One of the launchers has failed.
        restarts: The launcher restarts workers that fail.
        stop_requested: The workers were asked to stop, so none that fails is to be restarted.
    """
    if monitor.stopped():
        # A launcher that restarts workers takes a stop for a failure.
        return 0.0 if restarts else LAUNCHER_GRACE_S
    if restarts and not stop_requested:
        return math.inf
    if failures := monitor.failures():
        return 0.0 if failures[0].of_job else LAUNCHER_GRACE_S
    if launcher_failed and not restarts:
        return LAUNCHER_GRACE_S
    return math.inf if monitor.unfinished() else FINISHED_GRACE_S


def ending_signal(received: Sequence[int]) -> int | None:
    """Return the signal that ends the job at once, if there is one.

    It is SIGHUP, a second SIGTERM, Ctrl-C after any request to stop, or SIGTERM after Ctrl-C.
    """
    for place, signum in enumerate(received):
        before = received[:place]
        if signum == signal.SIGHUP or (signum == signal.SIGINT and before):
            return signum
        if signum == signal.SIGTERM and (signal.SIGTERM in before or signal.SIGINT in before):
            return signum
    return None


def end_processes(
    launchers: Sequence[subprocess.Popen[bytes]],
    monitor: WorkerMonitor,
    unrelated: Collection[int],
    received: Sequence[int],
) -> None:
    """End all descendants of this process but the unrelated ones, and return when none is left.

    Workers get SIGTERM first. After the grace period, or when the user sends another signal, they get SIGKILL.

    Args:
        launchers: The launchers' processes.
        monitor: The state of the workers.
        unrelated: Pids of children from before the job.
        received: The signals that this process has received; it grows.
    """
    deadline, received_before = min(time.monotonic() + WORKER_GRACE_S, monitor.ends_by()), len(received)
    terminated: set[psutil.Process] = set()
    # Processes of another user, as a program with the setuid bit starts them.
    out_of_reach: set[psutil.Process] = set()
    launcher_pids = {launcher.pid for launcher in launchers}
    while True:
        for launcher in launchers:
            launcher.poll()
        tree = descendants(os.getpid())
        job = [entry for entry in tree.values() if not descends_from(entry, tree, unrelated)]
        # Popen waits for its own children; another wait would take their exit codes away.
        reap([entry for entry in job if entry.process.pid not in launcher_pids])
        job = [entry for entry in job if entry.process not in out_of_reach]
        if not job:
            return
        agents = monitor.agent_pids()
        in_grace = time.monotonic() < deadline and len(received) == received_before
        for entry in job:
            if not (in_grace and descends_from(entry, tree, agents)):
                reached = send_signal(entry.process, signal.SIGKILL)
                out_of_reach |= set() if reached else {entry.process}
            elif entry.process not in terminated:
                terminated.add(entry.process)
                send_signal(entry.process, signal.SIGTERM)
        time.sleep(POLL_S / 5)


def reap(entries: Sequence[Descendant]) -> None:
    """Wait for adopted children that have ended, so that the kernel removes them."""
    for entry in entries:
        if entry.ended and entry.parent == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(entry.process.pid, os.WNOHANG)


def descends_from(entry: Descendant, tree: dict[int, Descendant], roots: Collection[int]) -> bool:
    """Return whether the process is one of `roots` (pids), or a descendant of one."""
    pid, ancestor = entry.process.pid, entry
    while pid not in roots:
        pid = ancestor.parent
        if pid not in tree:
            return False
        ancestor = tree[pid]
    return True


def outcome_of(command: Command, end: JobEnd, monitor: WorkerMonitor, received: Sequence[int]) -> JobOutcome:
    """Conclude how the job ended from the launchers' exit codes, the user's signals and the workers' ends."""
    failures = monitor.failures()
    # A worker that cannot handle a request to stop yet dies from the signal.
    codes = {failure.code for failure in failures}
    died_from = next((signum for signum in received if 128 + FORWARDED_AS.get(signum, signum) in codes), None)
    signum = died_from if end.signum is None else end.signum
    if signum is not None:
        return JobOutcome(128 + signum, f"stopped by {signal.Signals(signum).name}; every process has ended")
    if failures:
        return JobOutcome(failures[0].code, failures[0].text)
    if monitor.stopped():
        by = f" ({signal.Signals(received[0]).name})" if received else ""
        return JobOutcome(
            STOPPED_CODE, f"stopped on request{by}: every rank saved its checkpoint; start again to resume"
        )
    name, code = f"the {command.launcher} launcher", end.code
    if code is None:
        message = f"every rank finished, but {name} did not exit and was ended after {FINISHED_GRACE_S:g} s"
        return JobOutcome(0, message)
    how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
    job_code = 128 - code if code < 0 else code
    if unfinished := ", ".join(map(str, monitor.unfinished())):
        message = f"{name} {how} before rank {unfinished} finished or reported an error; see the output above"
        return JobOutcome(job_code or 1, message)
    # A launcher that continued without a host that it lost exits with an error for that host.
    message = f"every rank finished, but {name} {how}; see the output above" if job_code else ""
    return JobOutcome(0 if command.restarts else job_code, message)
