"""Reports, when a collective times out, which ranks had arrived in it and where the others are.

Each rank has a thread that wakes once a second to see whether a rank asks for positions. A rank whose collective times
out publishes its own position in the job's store, asks, and reads the positions that the others publish. A position is
read from the stack of the main thread at that moment, so nothing is recorded before. Durations are by each rank's own
clock.

Limits: a rank that does not answer is stopped, dead or cut off, or in a call of a C library that keeps the GIL. If the
process that hosts the store (rank 0; under torchrun the agent of the first host) does not answer, no position is known.
Under NCCL, torch's watchdog may end the process before the error reaches Python.
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

from dist_moe.comm.exchange import Pending, collectives_started
from dist_moe.errors import UserError

POLL_S = 1.0
ANSWER_S = 3.0
"""How long the others may take to answer."""
STORE_S = 2.0
"""How long the store may take in addition; one whose host is stopped never answers."""
RANKS_PER_POLL = 256
"""With more ranks each polls less often, so that rank 0's store gets at most this many requests a second."""
SHOWN_FRAMES = 5
REQUEST_KEY, POSITION_KEY = "hang/requested", "hang/position"
# The second is what TORCH_DISTRIBUTED_DEBUG=DETAIL checks before each collective.
TIMED_OUT = re.compile(r"time[ds]?[ -]?out|failed to pass monitoredBarrier", re.IGNORECASE)
PACKAGE = str(Path(__file__).parents[1])


class HangError(RuntimeError):
    """A collective timed out; the message has its name, the ranks that had arrived, and where the others are."""


@dataclass(frozen=True)
class Position:
    """Where the main thread of a rank is.

    Attributes:
        step: The training step.
        collective: The name of the torch.distributed function, or "" outside of collectives.
        sequence: The collective's number in its group; -1 where unknown.
        group: The ranks of the group.
        path: The innermost functions, `name:line`, of this package; outside of collectives, of any code.
        seconds: How long no step and no collective has started.
    """

    step: int
    collective: str
    sequence: int
    group: tuple[int, ...]
    path: str
    seconds: float

    def same_collective(self, other: "Position") -> bool:
        """Return whether two ranks wait for each other in the same call."""
        ours, theirs = ((one.collective, one.sequence, one.group) for one in (self, other))
        return ours == theirs and bool(self.collective)

    def __str__(self) -> str:
        name = f"in {self.collective} number {self.sequence}" if self.collective else "in no collective"
        return f"{name}, step {self.step}, for {self.seconds:.0f} s, at {self.path}"


class HangDetector:
    """Answers other ranks' requests for this rank's position, and asks for theirs after a time-out.

    Create it in the main thread, after the process group.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        timeout_s: The time-out of collectives, for the report.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._main_thread = threading.get_ident()
        self._step = 0
        self._progress: tuple[int, ...] = ()
        self._progress_s = time.monotonic()
        self._stopping = threading.Event()
        self._failed_at: Position | None = None
        # Each thread has a connection of its own: a call waits for the previous one on the same connection, forever
        # if the store's process is stopped.
        store: Any = c10d._get_default_store()
        self._answer_store, self._request_store = store.clone(), store.clone()
        self._period_s = POLL_S * max(1.0, world_size / RANKS_PER_POLL)

    def set_step(self, step: int) -> None:
        """Record the step that the main thread begins."""
        self._step = step

    def start(self) -> None:
        """Start the thread that answers."""
        threading.Thread(target=self._answer_requests, name="hang-detector", daemon=True).start()

    def stop(self) -> None:
        """Stop the thread that answers."""
        self._stopping.set()

    def announce_failure(self, error: BaseException) -> None:
        """Publish where `error` was raised on this rank, which ends and answers no more.

        It waits a second for a request. If there is one, it waits until the rank that asked has had its answers: a
        launch ends all workers as soon as one has ended, and the report would be lost.
        """
        position = self._failed_at = self._position(_traceback_frames(error))

        def announce() -> None:
            with contextlib.suppress(Exception):  # without a store or a request there is no reader
                self._publish(self._request_store, position)
                self._request_store.wait([REQUEST_KEY], timedelta(seconds=POLL_S))
                time.sleep(ANSWER_S + self._period_s)

        announcing = threading.Thread(target=announce, name="hang-detector-announce", daemon=True)
        announcing.start()
        announcing.join(STORE_S + POLL_S + ANSWER_S + self._period_s)

    def report(self, error: BaseException) -> str:
        """Describe what the collective that raised `error` was waiting for; takes a few seconds."""
        # From now on the main thread is in here: ranks that ask later get the position at the error.
        position = self._failed_at = self._position(_traceback_frames(error))
        answers: list[dict[int, Position | None]] = []

        def request() -> None:
            with contextlib.suppress(Exception):  # a store that fails must not hide what is known on this rank
                self._publish(self._request_store, position)
                self._request_store.set(REQUEST_KEY, "1")
                answers.append(self._collect_positions(position.group or tuple(range(self._world_size))))

        requesting = threading.Thread(target=request, name="hang-detector-request", daemon=True)
        requesting.start()
        requesting.join(STORE_S + ANSWER_S + self._period_s)
        return format_report(self._rank, position, answers[0] if answers else None, self._timeout_s)

    def _answer_requests(self) -> None:
        while not self._stopping.wait(self._period_s):
            progress = (self._step, *_sequences())
            if progress != self._progress:
                self._progress, self._progress_s = progress, time.monotonic()
            try:
                if self._answer_store.check([REQUEST_KEY]):
                    frame = sys._current_frames().get(self._main_thread)
                    self._publish(self._answer_store, self._failed_at or self._position(_outward_frames(frame)))
                    return
            except Exception:  # the store is gone with rank 0; a rank that waits for it gets an error of its own
                return

    def _position(self, frames: Sequence[FrameType]) -> Position:
        collective, sequence, group = _collective(frames)
        ours = [frame for frame in frames if _is_ours(frame)]
        shown = ours if collective or not frames else frames
        path = " < ".join(f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in shown[:SHOWN_FRAMES])
        ranks = tuple(dist.get_process_group_ranks(group)) if collective else ()
        seconds = time.monotonic() - self._progress_s
        return Position(self._step, collective, sequence, ranks, path or "unknown", seconds)

    def _publish(self, store: Any, position: Position) -> None:
        store.set(f"{POSITION_KEY}/{self._rank}", json.dumps(asdict(position)))

    def _collect_positions(self, ranks: Sequence[int]) -> dict[int, Position | None]:
        """Return the positions of the other ranks among `ranks`; None for those that do not answer in time."""
        others = [rank for rank in ranks if rank != self._rank]
        deadline = time.monotonic() + ANSWER_S + self._period_s
        while not self._all_answered(others) and time.monotonic() < deadline:
            time.sleep(self._period_s / 10)
        answered = self._answered(others)
        texts = self._request_store.multi_get([f"{POSITION_KEY}/{rank}" for rank in answered]) if answered else []
        return dict.fromkeys(others) | dict(zip(answered, map(_parse_position, texts), strict=True))

    def _all_answered(self, ranks: Sequence[int]) -> bool:
        """Ask for all ranks in one request: in a large job every rank that timed out asks for every other."""
        return not ranks or bool(self._request_store.check([f"{POSITION_KEY}/{rank}" for rank in ranks]))

    def _answered(self, ranks: Sequence[int]) -> list[int]:
        """Return the ranks that have answered, by bisection: few requests where few are silent."""
        if self._all_answered(ranks):
            return list(ranks)
        if len(ranks) == 1:
            return []
        middle = len(ranks) // 2
        return self._answered(ranks[:middle]) + self._answered(ranks[middle:])


def format_report(rank: int, own: Position, others: dict[int, Position | None] | None, timeout_s: float) -> str:
    """Write the message of a `HangError`.

    Args:
        rank: The rank that timed out.
        own: Its position.
        others: The positions of other ranks, None for a silent rank; None where the store does not answer.
        timeout_s: The time-out.
    """
    name = f"{own.collective or 'a collective'} number {own.sequence}"
    of = f" of ranks {_listed(own.group)}" if own.group else ""
    head = f"{name}{of} timed out (parallel.timeout_s={timeout_s:g})"
    own_position = f"rank {rank} is {own}"
    if others is None:
        return (
            f"{head}; {own_position}; the positions of the other ranks are unknown, because the job's store does not "
            "answer: the process that hosts it (rank 0; under torchrun the agent of the first host) may be stopped, "
            "dead or cut off"
        )
    members = {other: position for other, position in others.items() if not own.group or other in own.group}
    arrived = [rank, *(other for other, position in members.items() if position and position.same_collective(own))]
    silent = [other for other, position in members.items() if position is None]
    elsewhere = {other: position for other, position in members.items() if position and other not in arrived}
    parts = [head, f"arrived: rank {_listed(sorted(arrived))}"]
    if silent:
        parts.append(f"not arrived and not answering (stopped, dead or cut off): rank {_listed(silent)}")
    if elsewhere:
        parts.append(f"not arrived: rank {_listed(sorted(elsewhere))}")
    parts += [f"rank {other} is {position}" for other, position in elsewhere.items()]
    if not silent and not elsewhere:
        parts.append("all ranks arrived, so it was slow, or a connection between them is cut; raise parallel.timeout_s")
    return "; ".join([*parts, own_position])


@contextlib.contextmanager
def hang_detector(rank: int, world_size: int, timeout_s: float) -> Iterator[HangDetector]:
    """Run a hang detector in the block, which turns the error of a collective that timed out into a HangError.

    Args:
        rank: This rank.
        world_size: Number of ranks of the process group, which exists already.
        timeout_s: The time-out of collectives, for the report.

    Raises:
        HangError: A collective in the block timed out.
    """
    detector = HangDetector(rank, world_size, timeout_s)
    detector.start()
    try:
        yield detector
    except RuntimeError as error:
        # A user's error may mention time-outs too: that of a storage, or one in the name of a folder.
        if world_size > 1 and not isinstance(error, HangError | UserError):
            if TIMED_OUT.search(str(error)) and _collective(_traceback_frames(error))[0]:
                raise HangError(detector.report(error)) from error
            # A peer that timed out has closed its connections, so this rank had arrived.
            detector.announce_failure(error)
        raise
    finally:
        detector.stop()


def _traceback_frames(error: BaseException) -> list[FrameType]:
    """Return the frames in which an error was raised, the innermost first."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames[::-1]


def _outward_frames(frame: FrameType | None) -> list[FrameType]:
    """Return a frame and its callers."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(PACKAGE) and file != __file__ and frame.f_code is not Pending.wait.__code__


def _collective(frames: Sequence[FrameType]) -> tuple[str, int, Any]:
    """Return the outermost torch.distributed function among the frames, its number in its group, and the group.

    Without one: "", -1 and None.
    """
    for frame in frames[::-1]:
        if frame.f_code is Pending.wait.__code__:
            pending: Pending = frame.f_locals["self"]
            return pending.name, pending.number, pending.group
        if frame.f_code.co_filename == c10d.__file__ and not frame.f_code.co_name.startswith("_"):
            group = frame.f_locals.get("group") or c10d._get_default_group()
            return frame.f_code.co_name, collectives_started(group), group
    return "", -1, None


def _sequences() -> list[int]:
    """Return the number of collectives that each group has started."""
    return [collectives_started(group) for group in list(c10d._world.pg_map)]


def _parse_position(text: bytes) -> Position:
    values = json.loads(text)
    return Position(**{**values, "group": tuple(values["group"])})


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
