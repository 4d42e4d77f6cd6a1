"""Process faults: a signal to a worker or to the launch at a random moment, and the run that resumes after it."""

import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from dist_moe.checkpoint.format.layout import PARTIAL, step_folders
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, digest_if_readable, find_damage, read_manifest
from dist_moe.worker.contract import STOPPED_CODE
from tests.dist.resumable import same_bits, steps
from tests.faults.job import EVERY, STEPS, Job, job, state_of
from tests.faults.row import Row

Found = TypeVar("Found")

SETTLE_S = 10.0
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ProcessFault:
    """A signal to processes of a run.

    Attributes:
        signum: The signal.
        target: "worker", "launch", or "launch and a worker".
        launcher: What starts the run; None if workers are started directly.
        during_save: Whether to wait until a save is in progress; otherwise the moment is random.
        resumed_workers: How many workers resume the run; 0 if the launcher restarts it.
        asynchronous: As checkpoint.asynchronous.
        seed: Determines the moment and the rank.
        of_encoder: Whether the run is that of `encoder_run`.
    """

    signum: signal.Signals
    target: str
    launcher: str | None
    during_save: bool
    resumed_workers: int
    asynchronous: bool
    seed: int
    of_encoder: bool = False

    def of_try(self, number: int) -> "ProcessFault":
        """The same fault at another moment."""
        return replace(self, seed=self.seed + number)

    @property
    def kind(self) -> str:
        """The fault in words."""
        target = {"worker": "a worker", "launch": "the launch"}.get(self.target, "the launch and a worker")
        of_encoder = ", an upcycled encoder" if self.of_encoder else ""
        return f"{self.signum.name} to {target} ({self.launcher or 'started directly'}{of_encoder})"


def plan(seed: int) -> list[ProcessFault]:
    """56 faults; the seed determines only their moments, so that every campaign has the same kinds."""
    kill, stop, term, usr1 = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1
    kinds = [
        (kill, "worker", None, True, 2, 12),
        (kill, "worker", None, False, 2, 6),
        (kill, "worker", None, True, 1, 2),
        (kill, "worker", None, False, 4, 3),
        (stop, "worker", None, True, 2, 3),
        (stop, "worker", None, False, 2, 2),
        (term, "worker", None, False, 2, 1),
        (term, "worker", None, True, 2, 1),
        (usr1, "worker", None, True, 1, 1),
        (kill, "launch", "deepspeed", True, 2, 3),
        (kill, "launch", "torchrun", False, 2, 2),
        (kill, "worker", "deepspeed", False, 2, 2),
        (kill, "launch and a worker", "deepspeed", True, 2, 2),
        (term, "worker", "torchrun", False, 2, 1),
        (kill, "worker", "torchrun", True, 4, 1),
        (term, "launch", "deepspeed", False, 2, 2),
        (stop, "launch", "deepspeed", False, 2, 1),
        (stop, "launch", "torchrun", False, 2, 1),
        (usr1, "launch", "torchrun", False, 1, 1),
        (kill, "worker", "torchrun --max-restarts", True, 0, 3),
        (kill, "worker", "torchrun --max-restarts", False, 0, 3),
    ]
    faults: list[ProcessFault] = []
    for signum, target, launcher, during_save, resumed_workers, count in kinds:
        for _ in range(count):
            number = len(faults)
            asynchronous, fault_seed = number % 3 != 2, seed * 100_000 + number * 10
            faults.append(
                ProcessFault(signum, target, launcher, during_save, resumed_workers, asynchronous, fault_seed)
            )
    of_encoder = [(kill, True, 2), (kill, False, 1), (stop, True, 2)]
    for signum, during_save, resumed_workers in of_encoder:
        fault_seed = seed * 100_000 + len(faults) * 10
        faults.append(ProcessFault(signum, "worker", None, during_save, resumed_workers, True, fault_seed, True))
    return faults


def inject(fault: ProcessFault, text: Path, run: Path, undisturbed: Path, changes: Sequence[str] = ()) -> Row:
    """Start two workers, inject the fault, resume the run to its end, and compare it with the undisturbed run.

    Args:
        fault: What is injected.
        text: What the run is trained on.
        run: Its run.dir.
        undisturbed: The run.dir of the undisturbed run.
        changes: The overrides of both.
    """
    started_s, draw = time.monotonic(), random.Random(fault.seed)
    overrides = (
        *changes,
        f"checkpoint.asynchronous={str(fault.asynchronous).lower()}",
    )
    with job(text, run, 2, fault.launcher, *overrides) as running:
        injected = send_signal(fault, running, draw)
        failures = list(injected.failures)
        if not fault.resumed_workers:
            failures += compare([0], running.wait(), "the launch exits with {found}")
    failures += find_lost(injected.before)
    recovery, resumed_after = "by itself", 0
    if fault.resumed_workers:
        resumed_after = max((step for step, _ in step_folders(run / "checkpoints")), default=0)
        recovery = f"with {fault.resumed_workers} worker{'s' * (fault.resumed_workers > 1)}"
        with job(text, run, fault.resumed_workers, None, *overrides) as running:
            expected = [0] * fault.resumed_workers
            failures += compare(expected, running.wait(), "resumed, the workers exit with {found}")
        failures += find_lost(injected.before)
    failures += find_differences(run, undisturbed, fault.resumed_workers or 2, resumed_after)
    seconds = time.monotonic() - started_s
    return Row("process", fault.kind, fault.seed, fault.during_save, injected.evidence, recovery, failures, seconds)


@dataclass(frozen=True)
class Injected:
    """An injected fault.

    Attributes:
        before: The complete checkpoints and the digests of their manifests.
        evidence: Empty if the fault missed.
        failures: Processes that did not end as expected.
    """

    before: dict[Path, str]
    evidence: str = ""
    failures: tuple[str, ...] = ()


def send_signal(fault: ProcessFault, running: Job, draw: random.Random) -> Injected:
    """Wait for the moment, send the signal, and wait for the processes to end."""
    first = draw.randrange(EVERY, STEPS - 3 * EVERY)
    partial = wait_for_moment(running, first, fault.during_save)
    if not fault.during_save:
        time.sleep(draw.random() * 0.2)
    rank = draw.randrange(2)
    pid = running.processes[0].pid if fault.target == "launch" else running.pid(rank)
    before = complete_checkpoints(running.run)
    if pid is None or (fault.target != "launch" and not running.has(pid)):
        return Injected(before)
    step, in_progress = running.step, partial is not None and is_in_progress(partial)
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    with contextlib.suppress(ProcessLookupError):
        if fault.target == "launch and a worker":
            running.processes[0].send_signal(fault.signum)
        os.kill(pid, fault.signum)
    # Before and after the signal: so the save was in progress when the signal was sent.
    in_progress = in_progress and partial is not None and is_in_progress(partial)
    outcome, failures = wait_for_end(running, pid, fault)
    if not outcome or (fault.during_save and not in_progress):
        return Injected(before, failures=tuple(failures))
    save = f" during the save of {partial.name.removesuffix(PARTIAL)}" if partial is not None else ""
    target = "the launch" if fault.target == "launch" else f"rank {rank}"
    return Injected(before, f"{when}: process {pid}, {target}, {outcome} after step {step}{save}", tuple(failures))


def wait_for_moment(running: Job, first: int, during_save: bool) -> Path | None:
    """Wait until step `first` is logged, or until a save from it on is in progress -> the folder of the save."""
    folder = running.run / "checkpoints"

    def find() -> Path | None:
        if not during_save:
            return folder if running.step >= first else None
        partials = folder.glob(f"step-*{PARTIAL}") if folder.is_dir() else ()
        due = [path for path in partials if int(path.name.removesuffix(PARTIAL)[5:]) >= first]
        return next((path for path in due if is_in_progress(path)), None)

    found = poll(find, 90.0, 0.0002 if during_save else 0.005)
    return found if during_save else None


def is_in_progress(partial: Path) -> bool:
    """Whether a file of the checkpoint exists and the checkpoint is not complete."""
    return any(partial.rglob("*.safetensors")) and not partial.with_name(partial.name.removesuffix(PARTIAL)).exists()


def wait_for_end(running: Job, pid: int, fault: ProcessFault) -> tuple[str, list[str]]:
    """Wait until the target has ended, and all other processes if the launcher does not restart them.

    A stopped process is killed when the others have ended, as an operator of the machine would do.

    Returns:
        What became of the target, empty if the signal had no effect; and the processes that did not end as expected.
    """
    others = [worker for rank in range(running.ranks) if (worker := running.pid(rank)) not in (None, pid)]
    if fault.signum is signal.SIGSTOP:
        outcome = "stopped" if poll(lambda: state_of(pid) == "T" or None, 5.0) else ""
        failures = find_running(others, 60.0)
        os.kill(pid, signal.SIGKILL)
    else:
        outcome, failures = ("ended" if poll(lambda: has_ended(pid), 60.0) else ""), []
    if not fault.resumed_workers:
        return outcome, failures
    codes = running.wait()
    # Workers whose launch has ended must end by themselves.
    failures += find_running([other for other in others if not failures], SETTLE_S)
    if fault.signum in (signal.SIGTERM, signal.SIGUSR1):
        failures += compare([STOPPED_CODE] * len(codes), codes, "after a stop request, they exit with {found}")
    elif 0 in codes:
        failures.append(f"after the fault, they exit with {codes}")
    return outcome, failures


def find_running(pids: Sequence[int | None], limit_s: float) -> list[str]:
    """A message for each process that does not end within the limit."""
    running = [pid for pid in pids if pid is not None and not poll(lambda pid=pid: has_ended(pid), limit_s)]  # type: ignore[misc]
    return [f"process {pid} did not end by itself" for pid in running]


def has_ended(pid: int) -> bool | None:
    """True for a process that does not exist or is a zombie; None otherwise, for `poll`."""
    return state_of(pid) in ("gone", "Z") or None


def poll(find: Callable[[], Found | None], limit_s: float = 60.0, interval_s: float = 0.01) -> Found | None:
    """The first result of `find` that is not None; None after the limit."""
    deadline = time.monotonic() + limit_s
    while (found := find()) is None and time.monotonic() < deadline:
        time.sleep(interval_s)
    return found


def complete_checkpoints(run: Path) -> dict[Path, str]:
    """The digest of the manifest of each complete checkpoint."""
    digests = {path: digest_if_readable(path / MANIFEST_NAME) for _, path in step_folders(run / "checkpoints")}
    return {path: digest for path, digest in digests.items() if digest is not None}


def find_lost(before: dict[Path, str]) -> list[str]:
    """A message for each checkpoint that was complete before and is not intact now."""
    return [message for folder, digest in before.items() for message in _find_changes(folder, digest)]


def _find_changes(folder: Path, digest: str) -> Iterator[str]:
    if digest_if_readable(folder / MANIFEST_NAME) != digest:
        yield f"{folder.name} was complete, and has changed"
        return
    manifest = read_manifest(folder)
    yield from (f"{folder.name}: {damage}" for damage in find_damage(folder, manifest, manifest.files))


def find_differences(run: Path, undisturbed: Path, workers: int, resumed_after: int) -> list[str]:
    """How a run that resumed after step `resumed_after` differs from the undisturbed run.

    On the same layout every bit of the last checkpoint and every metric must be equal; on another the losses since,
    up to rounding.
    """
    ours, theirs = steps(run), steps(undisturbed)
    differences = compare(list(theirs), list(ours), "the steps are {found}")
    if differences:
        return differences
    if workers == 2:
        last = f"checkpoints/step-{STEPS:06d}"
        differences += [f"{name} differs" for name in same_bits(run / last, undisturbed / last)]
        pairs = itertools.product(theirs, ("loss", "grad_norm", "load"))
        unequal = [(step, field) for step, field in pairs if ours[step][field] != theirs[step][field]]
        return differences + [f"{field} of step {step} differs" for step, field in unequal]
    if not any(step > resumed_after for step in theirs):
        return ["no step was made after the fault"]
    return [
        f"the loss of step {step} is {ours[step]['loss']} instead of {theirs[step]['loss']}"
        for step in theirs
        if not abs(ours[step]["loss"] - theirs[step]["loss"])
        <= (LOSS_TOLERANCE * theirs[step]["loss"] if step > resumed_after else 0)
    ]


def compare(expected: Sequence[object], found: Sequence[object], message: str) -> list[str]:
    """`message` with what was found, if it differs from what was expected."""
    return [] if list(expected) == list(found) else [message.format(found=list(found))]
