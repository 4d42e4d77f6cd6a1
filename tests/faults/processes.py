"""Process faults: a signal to a worker or to the launch at a drawn moment, and the run that goes on after it."""

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

from dist_moe.checkpoint.format.layout import PARTIAL, checkpoints
from dist_moe.checkpoint.format.manifest import NAME, digest, find_damage, read_manifest
from dist_moe.worker.contract import STOPPED_CODE
from tests.dist.resumable import same_bits, steps
from tests.faults.job import EVERY, STEPS, Job, job, state_of
from tests.faults.row import Row

Found = TypeVar("Found")

SETTLE_S = 10.0
CLOSE = 1e-4


@dataclass(frozen=True)
class ProcessFault:
    """signum to `target` ("worker", "launch" or both) of a run that `launcher` started (None: directly).

    inside: inside a save, else at a random moment. onward: the workers that go on; 0 where the launcher itself does.
    """

    signum: signal.Signals
    target: str
    launcher: str | None
    inside: bool
    onward: int
    asynchronous: bool
    seed: int

    def of_try(self, number: int) -> "ProcessFault":
        """The same at another moment."""
        return replace(self, seed=self.seed + number)

    @property
    def kind(self) -> str:
        """In words."""
        of = {"worker": "a worker", "launch": "the launch"}.get(self.target, "the launch and a worker")
        return f"{self.signum.name} to {of} ({self.launcher or 'started directly'})"


def plan(seed: int) -> list[ProcessFault]:
    """53 faults; the seed draws the moments alone, so that every campaign has the same kinds."""
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
    found: list[ProcessFault] = []
    for signum, target, launcher, inside, onward, count in kinds:
        for _ in range(count):
            number = len(found)
            found.append(
                ProcessFault(signum, target, launcher, inside, onward, number % 3 != 2, seed * 100_000 + number * 10)
            )
    return found


def inject(fault: ProcessFault, text: Path, run: Path, undisturbed: Path) -> Row:
    """Start two workers, strike, let the run go on to its end, and compare it with the one that nothing happened to."""
    began_s, draw = time.monotonic(), random.Random(fault.seed)
    changes = (f"checkpoint.asynchronous={str(fault.asynchronous).lower()}",)
    with job(text, run, 2, fault.launcher, *changes) as running:
        struck = strike(fault, running, draw)
        wrong = list(struck.wrong)
        wrong += [] if fault.onward else unlike([0], running.wait(), "the launch ends with {found}")
    wrong += lost(struck.before)
    onward, goes_on = "by itself", 0
    if fault.onward:
        goes_on = max((step for step, _ in checkpoints(run / "checkpoints")), default=0)
        onward = f"with {fault.onward} worker{'s' * (fault.onward > 1)}"
        with job(text, run, fault.onward, None, *changes) as again:
            wrong += unlike([0] * fault.onward, again.wait(), "started again, the workers end with {found}")
        wrong += lost(struck.before)
    wrong += differing(run, undisturbed, fault.onward or 2, goes_on)
    seconds = time.monotonic() - began_s
    return Row("process", fault.kind, fault.seed, fault.inside, struck.proof, onward, wrong, seconds)


@dataclass(frozen=True)
class Struck:
    """before: the complete checkpoints and the digests of their manifests. proof: empty where it missed.

    wrong: what did not end as it has to.
    """

    before: dict[Path, str]
    proof: str = ""
    wrong: tuple[str, ...] = ()


def strike(fault: ProcessFault, running: Job, draw: random.Random) -> Struck:
    """Wait for the moment, send the signal, and wait for the end."""
    first = draw.randrange(EVERY, STEPS - 3 * EVERY)
    partial = wait_for(running, first, fault.inside)
    if not fault.inside:
        time.sleep(draw.random() * 0.2)
    rank = draw.randrange(2)
    pid = running.processes[0].pid if fault.target == "launch" else running.pid(rank)
    before = complete(running.run)
    if pid is None or (fault.target != "launch" and not running.has(pid)):
        return Struck(before)
    step, inside = running.step, partial is not None and is_inside(partial)
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    with contextlib.suppress(ProcessLookupError):
        if fault.target == "launch and a worker":
            running.processes[0].send_signal(fault.signum)
        os.kill(pid, fault.signum)
    inside = inside and partial is not None and is_inside(partial)
    became, wrong = settle(running, pid, fault)
    if not became or (fault.inside and not inside):
        return Struck(before, wrong=tuple(wrong))
    where = f" inside the save of {partial.name.removesuffix(PARTIAL)}" if partial is not None else ""
    target = "the launch" if fault.target == "launch" else f"rank {rank}"
    return Struck(before, f"{when}: process {pid}, {target}, {became} after step {step}{where}", tuple(wrong))


def wait_for(running: Job, first: int, inside: bool) -> Path | None:
    """Wait until a step is logged, or until a save from it on is under way -> its folder."""
    folder = running.run / "checkpoints"

    def look() -> Path | None:
        if not inside:
            return folder if running.step >= first else None
        parts = folder.glob(f"step-*{PARTIAL}") if folder.is_dir() else ()
        at = [path for path in parts if int(path.name.removesuffix(PARTIAL)[5:]) >= first]
        return next((path for path in at if is_inside(path)), None)

    found = until(look, 90.0, 0.0002 if inside else 0.005)
    return found if inside else None


def is_inside(partial: Path) -> bool:
    """Whether the checkpoint is begun, has some file, and is not complete."""
    return any(partial.rglob("*.safetensors")) and not partial.with_name(partial.name.removesuffix(PARTIAL)).exists()


def settle(running: Job, pid: int, fault: ProcessFault) -> tuple[str, list[str]]:
    """Wait until what was struck has ended, and all others where nobody starts them again.

    -> what became of it, and what did not end as it has to. What is stopped is killed once the others are gone, as
    whoever minds such a machine would do.
    """
    others = [worker for rank in range(running.ranks) if (worker := running.pid(rank)) not in (None, pid)]
    if fault.signum is signal.SIGSTOP:
        became = "stopped" if until(lambda: state_of(pid) == "T" or None, 5.0) else ""
        wrong = alive(others, 60.0)
        os.kill(pid, signal.SIGKILL)
    else:
        became, wrong = ("ended" if until(lambda: ended(pid), 60.0) else ""), []
    if not fault.onward:
        return became, wrong
    codes = running.wait()
    # Workers of a launch that is gone end by themselves.
    wrong += alive([other for other in others if not wrong], SETTLE_S)
    if fault.signum in (signal.SIGTERM, signal.SIGUSR1):
        wrong += unlike([STOPPED_CODE] * len(codes), codes, "asked to stop, they end with {found}")
    elif 0 in codes:
        wrong.append(f"struck, they end with {codes}")
    return became, wrong


def alive(pids: Sequence[int | None], limit_s: float) -> list[str]:
    """Those that do not end by themselves, in words."""
    left = [pid for pid in pids if pid is not None and not until(lambda pid=pid: ended(pid), limit_s)]  # type: ignore[misc]
    return [f"process {pid} did not end by itself" for pid in left]


def ended(pid: int) -> bool | None:
    """True for a process that is gone, or that only its parent has not looked after yet."""
    return state_of(pid) in ("gone", "Z") or None


def until(look: Callable[[], Found | None], limit_s: float = 60.0, every_s: float = 0.01) -> Found | None:
    """What `look` finds, once it finds something; None after the limit."""
    deadline = time.monotonic() + limit_s
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(every_s)
    return found


def complete(run: Path) -> dict[Path, str]:
    """The checkpoints that are complete, and the digests of their manifests."""
    found = {path: digest(path / NAME) for _, path in checkpoints(run / "checkpoints")}
    return {path: told for path, told in found.items() if told is not None}


def lost(before: dict[Path, str]) -> list[str]:
    """What of the checkpoints that were complete is not any more."""
    return [wrong for folder, told in before.items() for wrong in _changed(folder, told)]


def _changed(folder: Path, told: str) -> Iterator[str]:
    if digest(folder / NAME) != told:
        yield f"{folder.name} was complete, and is not as it was"
        return
    manifest = read_manifest(folder)
    yield from (f"{folder.name}: {wrong}" for wrong in find_damage(folder, manifest, manifest.files))


def differing(run: Path, undisturbed: Path, workers: int, goes_on: int) -> list[str]:
    """What of a run that went on after step `goes_on` is not as if nothing had been.

    On the same layout every bit of the last checkpoint and every figure; on another the losses since, to rounding.
    """
    ours, theirs = steps(run), steps(undisturbed)
    wrong = unlike(list(theirs), list(ours), "the steps are {found}")
    if wrong:
        return wrong
    if workers == 2:
        last = f"checkpoints/step-{STEPS:06d}"
        wrong += [f"{name} differs" for name in same_bits(run / last, undisturbed / last)]
        places = itertools.product(theirs, ("loss", "grad_norm", "load"))
        differ = [(step, field) for step, field in places if ours[step][field] != theirs[step][field]]
        return wrong + [f"{field} of step {step} differs" for step, field in differ]
    compared = [step for step in theirs if step > goes_on]
    if not compared:
        return ["no step was made after the fault"]
    return [
        f"the loss of step {step} is {ours[step]['loss']} instead of {theirs[step]['loss']}"
        for step in theirs
        if not abs(ours[step]["loss"] - theirs[step]["loss"]) <= (CLOSE * theirs[step]["loss"] if step > goes_on else 0)
    ]


def unlike(wanted: Sequence[object], found: Sequence[object], told: str) -> list[str]:
    """`told` with what was found, where it is not what was wanted."""
    return [] if list(wanted) == list(found) else [told.format(found=list(found))]
