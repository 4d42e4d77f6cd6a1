"""Measures a case of the training step: all programs live at once, and take turns in every round."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch

from benchmarks.cases import Entry, StepCase
from benchmarks.environment import cores
from benchmarks.row import Row
from benchmarks.step.programs import PROGRAMS, Place, prepare
from benchmarks.step.session import CannotRun, Session, SessionError, Turn
from benchmarks.step.setting import STEPS_OF_TEXT
from dist_moe.balancing.load import max_vio, max_vio_floor

Log = Callable[[str], None]


def measure_steps(case: StepCase, rounds: int, steps: int, log: Log) -> list[Row]:
    """Measure a case, in `rounds` rounds of one turn of `steps` steps for each program.

    The order of the programs moves on by one in each round.
    """
    if case.workers > len(cores()):
        reason = f"needs {case.workers} cores, one for each worker, and this process may use {len(cores())}"
        return [Row(entry.name, reason) for entry in case.entries]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, ExitStack() as stack:
        programs = start_all(case, Path(name), stack, log)
        live = [(row, session) for row, session in programs if session is not None]
        for number in range(rounds):
            offset = number % max(1, len(live))
            take_turns(live[offset:] + live[:offset], case, steps, log)
            log(f"  round {number + 1} of {rounds}")
        count_bytes(live, log)
    return [row for row, _ in programs]


def start_all(case: StepCase, folder: Path, stack: ExitStack, log: Log) -> list[tuple[Row, Session | None]]:
    """Start all programs of a case until the end of `stack`, one after the other, with their steps of warmup.

    Returns:
        For each its row, and its session; None for one that does not run, whose row says why.
    """
    vocabulary, end_id = prepare(case, folder / "text", STEPS_OF_TEXT)
    found: list[tuple[Row, Session | None]] = []
    for number, entry in enumerate(case.entries):
        row, session = Row(entry.name), None
        place = Place(folder / f"program-{number}", folder / "text", vocabulary, end_id)
        with failure_as_reason(row, log):
            require_memory(1.2 * case.workers * max((other.peak_mib or 0 for other, _ in found), default=0))
            session = start(case, entry, place, stack)
            row.start_s = round(session.start_s, 2)
            row.peak_mib = session.run(case.warmup_steps).peak_mib
        found.append((row, None if row.reason else session))
    return found


@contextmanager
def failure_as_reason(row: Row, log: Log) -> Iterator[None]:
    """Write down why a program did not run, or stopped to run, in the block."""
    try:
        yield
    except (CannotRun, SessionError) as error:
        row.reason = str(error)
        log(f"  {row.name}: {row.reason.splitlines()[0]}")


def start(case: StepCase, entry: Entry, place: Place, stack: ExitStack) -> Session:
    """Start the workers of a program, until the end of `stack`."""
    commands = PROGRAMS[entry.program].commands(case, entry, place)
    return stack.enter_context(Session(commands, case.workers, place.folder / "output.log"))


def count_bytes(live: Sequence[tuple[Row, Session]], log: Log) -> None:
    """Let each program make one more step, and write down what it gives to collectives.

    The times of a program whose step fails here stay, without the bytes.
    """
    for row, session in live:
        if row.measured:
            try:
                row.bytes = session.run(1, count_bytes=True).bytes
            except SessionError as error:
                log(f"  {row.name}: the bytes of its collectives were not counted: {error}")


def require_memory(needed_mib: float) -> None:
    """Refuse a program for which there is no room beside the live ones.

    Raises:
        CannotRun: Less than `needed_mib` is available.
    """
    available_mib = psutil.virtual_memory().available / 2**20
    if available_mib < needed_mib:
        raise CannotRun(f"needs about {needed_mib:,.0f} MiB of memory, and {available_mib:,.0f} MiB are available")


def take_turns(live: Sequence[tuple[Row, Session]], case: StepCase, steps: int, log: Log) -> None:
    """Let each program make a turn, and write down what it reports; one that fails has no further turns."""
    for row, session in live:
        if row.reason:
            continue
        with failure_as_reason(row, log):
            turn = session.run(steps)
            row.seconds.append(round(turn.seconds / steps, 6))
            row.peak_mib, row.loss = round(turn.peak_mib, 1), round(turn.loss, 4)
            describe_loads(row, turn, case)


def describe_loads(row: Row, turn: Turn, case: StepCase) -> None:
    """Write down how evenly the experts were loaded."""
    if not turn.loads:
        return
    load_LE = torch.tensor(turn.loads)
    floors = [max_vio_floor(load_LE.shape[1], assignments) for assignments in load_LE.sum(dim=1).tolist()]
    row.max_vio, row.max_vio_floor = round(float(max_vio(load_LE).mean()), 3), round(sum(floors) / len(floors), 3)
    row.experts_per_token = round(int(load_LE.sum()) / (len(turn.loads) * case.tokens), 3)
