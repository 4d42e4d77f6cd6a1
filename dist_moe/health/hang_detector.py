"""Tells what a collective waited for when it ran out of time: which ranks had arrived, and where the others stand.

Each rank has a thread that sleeps, and wakes once a second to see whether somebody asks. A rank whose collective runs
out of time writes its own position into the job's store, asks, and reads what the others write. A position is read off
the stack of the main thread, so that it costs nothing before. Every age is of the rank's own clock.

What it cannot know: a rank that does not answer is stopped, dead, or cut off, or in a call of a library in C that keeps
Python's other threads waiting. Where whoever keeps the store does not answer (rank 0; under torchrun the agent of the
first host), nobody's position can be had. Under NCCL, torch's watchdog may end the process before the error reaches
Python.
"""

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dist_moe.errors import UserError

LOOK_S = 1.0
ANSWER_S = 3.0
"""How long the others may take to answer."""
STORE_S = 2.0
"""How long the store may take besides; one whose host is stopped never answers."""
RANKS_PER_LOOK = 256
"""More ranks look less often, so that rank 0's store is not asked more than this many times a second."""
SHOWN_FRAMES = 4
ASKED, ANSWER = "hang/asked", "hang/position"
OUT_OF_TIME = re.compile(r"time[ds]?[ -]?out", re.IGNORECASE)
PACKAGE = str(Path(__file__).parents[1])


class HangError(RuntimeError):
    """A collective ran out of time; the message says which, who had arrived, and where the others stand."""


@dataclass(frozen=True)
class Position:
    """Where a rank stands. collective: torch's name of it, "" outside of any. sequence: its number in its group.

    group: the ranks of it. path: the innermost functions, `name:line`, of this package, or outside of it and of
    collectives of whatever runs. seconds: for how long no step and no collective has begun.
    """

    step: int
    collective: str
    sequence: int
    group: tuple[int, ...]
    path: str
    seconds: float

    def same_collective(self, other: "Position") -> bool:
        """Whether two ranks wait for each other in the same call."""
        ours, theirs = ((one.collective, one.sequence, one.group) for one in (self, other))
        return ours == theirs and bool(self.collective)

    def __str__(self) -> str:
        name = f"in {self.collective} number {self.sequence}" if self.collective else "in no collective"
        return f"{name}, step {self.step}, for {self.seconds:.0f} s, at {self.path}"


class HangDetector:
    """One rank's. The main thread says at which step it is; the thread of the lookout does the rest."""

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._main = threading.get_ident()
        self._step = 0
        self._seen: tuple[int, ...] = ()
        self._since_s = time.monotonic()
        self._over = threading.Event()
        self._fell: Position | None = None
        # Connections of their own: a call on one waits for the call before, and on a store that is stopped for ever.
        store: Any = c10d._get_default_store()
        self._store, self._asking = store.clone(), store.clone()
        self._period_s = LOOK_S * max(1.0, world_size / RANKS_PER_LOOK)

    def set_step(self, step: int) -> None:
        """The main thread begins this step."""
        self._step = step

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._look, name="lookout", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def announce_failure(self, error: BaseException) -> None:
        """Tell the others where `error` met this rank, which answers no more: a second where nobody asks.

        Where somebody does, it stays until that one has had its answers: a launch ends all others as soon as one has
        ended, and the report would be lost.
        """
        own = self._fell = self._position(_frames(error))

        def tell() -> None:
            with contextlib.suppress(Exception):  # without a store nobody reads it, and without a question nobody asks
                self._tell(self._asking, own)
                self._asking.wait([ASKED], timedelta(seconds=LOOK_S))
                time.sleep(ANSWER_S + self._period_s)

        telling = threading.Thread(target=tell, name="lookout leaves", daemon=True)
        telling.start()
        telling.join(STORE_S + LOOK_S + ANSWER_S + self._period_s)

    def report(self, error: BaseException) -> str:
        """What the collective that `error` came from has waited for; a few seconds."""
        # The main thread is in here from now on: others that ask later are told where it stood, not this.
        own = self._fell = self._position(_frames(error))
        answers: list[dict[int, Position | None]] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # whatever becomes of the store, what is known here is told
                self._tell(self._asking, own)
                self._asking.set(ASKED, "1")
                answers.append(self._answers(own.group or tuple(range(self._world_size))))

        asking = threading.Thread(target=ask, name="lookout asks", daemon=True)
        asking.start()
        asking.join(STORE_S + ANSWER_S + self._period_s)
        return format_report(self._rank, own, answers[0] if answers else None, self._timeout_s)

    def _look(self) -> None:
        while not self._over.wait(self._period_s):
            begun = (self._step, *_sequences())
            if begun != self._seen:
                self._seen, self._since_s = begun, time.monotonic()
            try:
                if self._store.check([ASKED]):
                    frame = sys._current_frames().get(self._main)
                    self._tell(self._store, self._fell or self._position(_outwards(frame)))
                    return
            except Exception:  # the store is gone with rank 0, and whoever waits for it learns that by himself
                return

    def _position(self, frames: Sequence[FrameType]) -> Position:
        collective, group = _collective(frames)
        ours = [frame for frame in frames if _is_ours(frame.f_code.co_filename)]
        shown = ours if collective or not frames else frames
        path = " < ".join(f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in shown[:SHOWN_FRAMES])
        ranks = tuple(dist.get_process_group_ranks(group)) if collective else ()
        seconds = time.monotonic() - self._since_s
        return Position(self._step, collective, _sequence(group), ranks, path or "unknown", seconds)

    def _tell(self, store: Any, position: Position) -> None:
        store.set(f"{ANSWER}/{self._rank}", json.dumps(asdict(position)))

    def _answers(self, ranks: Sequence[int]) -> dict[int, Position | None]:
        """The positions of the others among these, None of those that do not answer in time."""
        others = [rank for rank in ranks if rank != self._rank]
        deadline = time.monotonic() + ANSWER_S + self._period_s
        while not self._have_answered(others) and time.monotonic() < deadline:
            time.sleep(self._period_s / 10)
        there = self._those_that_answered(others)
        texts = self._asking.multi_get([f"{ANSWER}/{rank}" for rank in there]) if there else []
        return dict.fromkeys(others) | dict(zip(there, map(_parse, texts), strict=True))

    def _have_answered(self, ranks: Sequence[int]) -> bool:
        """Whether all of them have, by one request: at scale every rank that waits asks after every other."""
        return not ranks or bool(self._asking.check([f"{ANSWER}/{rank}" for rank in ranks]))

    def _those_that_answered(self, ranks: Sequence[int]) -> list[int]:
        if self._have_answered(ranks):
            return list(ranks)
        if len(ranks) == 1:
            return []
        middle = len(ranks) // 2
        return self._those_that_answered(ranks[:middle]) + self._those_that_answered(ranks[middle:])


def format_report(rank: int, own: Position, others: dict[int, Position | None] | None, timeout_s: float) -> str:
    """The words for it. others: None where the store could not be asked, a position of None for a silent rank."""
    name = f"{own.collective or 'a collective'} number {own.sequence}"
    of = f" of ranks {_listed(own.group)}" if own.group else ""
    head = f"{name}{of} ran out of time (parallel.timeout_s={timeout_s:g})"
    mine = f"rank {rank} stands {own}"
    if others is None:
        return (
            f"{head}; {mine}; the positions of the others could not be had, because the job's store does not answer: "
            "whoever keeps it (rank 0; under torchrun the agent of the first host) may be stopped, dead or cut off"
        )
    concerned = {one: position for one, position in others.items() if not own.group or one in own.group}
    arrived = [rank, *(one for one, position in concerned.items() if position and position.same_collective(own))]
    silent = [one for one, position in concerned.items() if position is None]
    elsewhere = {one: position for one, position in concerned.items() if position and one not in arrived}
    parts = [head, f"arrived: rank {_listed(sorted(arrived))}"]
    if silent:
        parts.append(f"not arrived, and silent (stopped, dead or cut off): rank {_listed(silent)}")
    if elsewhere:
        parts.append(f"not arrived: rank {_listed(sorted(elsewhere))}")
    parts += [f"rank {one} stands {position}" for one, position in elsewhere.items()]
    if not silent and not elsewhere:
        parts.append("all have arrived, so it was slow, or a link between them is cut; raise parallel.timeout_s")
    return "; ".join([*parts, mine])


@contextlib.contextmanager
def hang_detector(rank: int, world_size: int, timeout_s: float) -> Iterator[HangDetector]:
    """In the block, an error of a collective that ran out of time becomes a HangError. For a joined process group."""
    one = HangDetector(rank, world_size, timeout_s)
    one.start()
    try:
        yield one
    except RuntimeError as error:
        # A user's error may speak of time-outs too: of a storage, or by the name of a folder.
        if world_size > 1 and not isinstance(error, HangError | UserError):
            if OUT_OF_TIME.search(str(error)) and _collective(_frames(error))[0]:
                raise HangError(one.report(error)) from error
            one.announce_failure(error)  # a peer that ran out of time has closed its connections: this rank had arrived
        raise
    finally:
        one.stop()


def _frames(error: BaseException) -> list[FrameType]:
    """Where an error came from, the innermost frame first."""
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    return found[::-1]


def _is_ours(file: str) -> bool:
    return file.startswith(PACKAGE) and file != __file__


def _outwards(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _collective(frames: Sequence[FrameType]) -> tuple[str, Any]:
    """The outermost call of torch.distributed among the frames, and its group."""
    for frame in frames[::-1]:
        if frame.f_code.co_filename == c10d.__file__ and not frame.f_code.co_name.startswith("_"):
            return frame.f_code.co_name, frame.f_locals.get("group") or c10d._get_default_group()
    return "", None


def _sequences() -> list[int]:
    """How many collectives each group has begun."""
    return [_sequence(group) for group in list(c10d._world.pg_map)]


def _sequence(group: Any) -> int:
    """How many collectives a group has begun; -1 for none, and where the backend does not count."""
    try:
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, AttributeError):
        return -1


def _parse(text: bytes) -> Position:
    values = json.loads(text)
    return Position(**{**values, "group": tuple(values["group"])})


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
