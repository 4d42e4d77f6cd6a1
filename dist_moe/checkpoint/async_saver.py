"""Saves checkpoints while training goes on: begun at one step boundary, completed at a later one.

How a checkpoint comes to be, on every rank alike:
1. `save_async`, at a step boundary: the tensors are copied into the host's memory, and a thread begins to write them into
   `step-NNNNNN.partial`. Training waits for the copy alone.
2. At each later boundary every rank tells, in the one all-reduce that a step makes anyhow, whether its files are
   written.
3. `finalize`, at the first boundary at which all have told so, or when somebody has to wait: rank 0 lists the files with
   sizes and digests in manifest.json, and renames the folder, in a thread too: the others wait in short collectives,
   so that storage that is slow is no reason for a time-out.

The threads make no collectives, so that those of training keep their order, and a checkpoint becomes complete on all
ranks at the same step.
"""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.file_transfer import FileTransfer, broadcast_files, find_hosts
from dist_moe.checkpoint.format.layout import PARTIAL, checkpoint_folder, complete
from dist_moe.checkpoint.format.manifest import FileEntry, entry
from dist_moe.checkpoint.snapshot import Snapshot, StagingBuffer, collect
from dist_moe.comm.reduce import all_reduce_counts
from dist_moe.engine.train_state import TrainState

Result = TypeVar("Result")

LONGEST_POLL_S = 5.0


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint. bytes: of its files. warnings: what went wrong besides, and does it no harm.

    stall_s: how long training stood still for it: the slowest rank's copy, and this rank's wait at the end, which all
    leave together. write_s: how long the files of the slowest rank took.
    """

    step: int
    folder: Path
    bytes: int
    stall_s: float
    write_s: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What one rank's thread has written, and how long that took."""

    files: dict[str, FileEntry]
    seconds: float


@dataclass(frozen=True)
class Work:
    """A checkpoint whose files are being written. keep_all: whether older ones stay. stall_s: so far, on this rank."""

    step: int
    partial: Path
    keep_all: bool
    work: Future[Written]
    stall_s: float


class AsyncSaver:
    """The checkpoints of one run. Every rank has one and calls its methods alike: `save_async` and `finalize` are collective.

    warn: told what somebody should know while it waits.
    """

    def __init__(self, training: TrainState, warn: Callable[[str], None] = print) -> None:
        self._training = training
        self._warn = warn
        self._mesh = training.engine.mesh
        self._hosts = find_hosts(self._mesh, training.config.cluster.shared_storage)
        self._copy = StagingBuffer()
        self._pending: Work | None = None
        self._deleting: Future[None] | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not finished; the same on all ranks."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank's files of the pending checkpoint are written, or will not be."""
        return self._pending is not None and self._pending.work.done()

    def save_async(self, step: int, keep_all: bool = False, asynchronous: bool = True) -> None:
        """Begin to save the run after `step`; the checkpoint before has to be finished.

        keep_all: whether checkpoint.keep_last and keep_every delete nothing this time. beside: whether training goes
        on at once, for which the tensors are copied; else nothing may change before `finalize`. Errors: CheckpointError,
        on all ranks alike.
        """
        if self._pending is not None:
            raise RuntimeError(f"the checkpoint of step {self._pending.step} is not finished")
        began_s = time.perf_counter()
        final = checkpoint_folder(self._training.config, step)
        partial = final.with_name(final.name + PARTIAL)
        found: list[Snapshot] = []

        def prepare() -> None:
            if self._hosts.is_host_leader(self._mesh.rank):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            snapshot = collect(self._training, step)
            found.append(self._copy.of(snapshot) if asynchronous else snapshot)

        try:
            run_on_all_ranks(self._mesh, _told(final), prepare)
        except CheckpointError:
            if self._hosts.is_host_leader(self._mesh.rank):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        work = in_thread(f"save step {step}", lambda: _write(found[0], partial))
        self._pending = Work(step, partial, keep_all, work, time.perf_counter() - began_s)

    def finalize(self) -> Saved | None:
        """Wait until every rank has written its files, and make the checkpoint complete; None where none is pending.

        Errors: CheckpointError, on all ranks alike, where one could not write; what was saved before is as it was.
        """
        pending, mesh = self._pending, self._mesh
        if pending is None:
            return None
        began_s = time.perf_counter()
        final = checkpoint_folder(self._training.config, pending.step)
        self._await(pending.work, pending.partial, "written its files")
        self._pending = None
        work: Future[list[str]] | None = None
        try:
            answers = run_on_all_ranks(mesh, _told(final), lambda: (pending.work.result(), pending.stall_s))
            came = self._broadcast_file(pending.partial, final, [written.files for written, _ in answers])
            files = {name: found for written, _ in answers for name, found in written.files.items()}
            work = in_thread(f"complete step {pending.step}", lambda: self._complete(pending, final, files, came))
            self._await(work, final, "completed it")
            warnings = run_on_all_ranks(mesh, _told(final), work.result)[0]
        finally:
            # After a failure, or on a host that is not rank 0's; never under a thread that still completes it.
            if self._hosts.is_host_leader(mesh.rank) and (work is None or work.done()):
                shutil.rmtree(pending.partial, ignore_errors=True)
        return Saved(
            step=pending.step,
            folder=final,
            bytes=sum(found.bytes for found in files.values()),
            stall_s=max(stall_s for _, stall_s in answers) + time.perf_counter() - began_s,
            write_s=max(written.seconds for written, _ in answers),
            warnings=tuple(warnings),
        )

    def save(self, step: int, keep_all: bool = False) -> Saved:
        """Save the run after `step`, complete when the call returns. Errors: as `save_async` and `finalize`."""
        self.save_async(step, keep_all, asynchronous=False)
        saved = self.finalize()
        assert saved is not None
        return saved

    def close(self) -> None:
        """Wait until what is not kept has been deleted; this rank's own work."""
        if self._deleting is not None:
            self._deleting.result()

    def _await(self, work: Future[Any], folder: Path, done_is: str) -> None:
        """Wait for the slowest rank's thread, in short collectives. folder, done_is: for the words of a warning."""
        limit_s = self._training.config.parallel.timeout_s
        began_s, warned = time.monotonic(), 0
        while True:
            wait_for([work], timeout=min(LONGEST_POLL_S, limit_s / 4))
            own = torch.zeros(self._mesh.world_size, dtype=torch.int64)
            own[self._mesh.rank] = int(work.done())
            (done,) = all_reduce_counts([own], self._training.engine.device)
            slow = [rank for rank, flag in enumerate(done.tolist()) if not flag]
            if not slow:
                return
            waited_s = time.monotonic() - began_s
            if waited_s > limit_s * (warned + 1):
                warned += 1
                ranks = ", ".join(map(str, slow))
                told = f"after {waited_s:.0f} s rank {ranks} has not {done_is}"
                self._warn(f"{folder}: {told}; see to the storage there")

    def _broadcast_file(self, partial: Path, final: Path, written: list[dict[str, FileEntry]]) -> dict[str, FileEntry]:
        """Bring what other hosts have written to rank 0's, where they share no storage; training waits for it.

        -> the files that came.
        """
        transfers = [
            FileTransfer(name, found.bytes, rank) for rank, part in enumerate(written) for name, found in part.items()
        ]
        far = [transfer for transfer in transfers if self._hosts.is_remote(transfer.owner)]
        if far:
            mesh, device = self._mesh, self._training.engine.device
            here = partial if mesh.rank == 0 else None
            run_on_all_ranks(mesh, _told(final), lambda: broadcast_files(far, mesh, device, partial, here))
        return {transfer.name: written[transfer.owner][transfer.name] for transfer in far}

    def _complete(
        self, pending: Work, final: Path, files: dict[str, FileEntry], came: dict[str, FileEntry]
    ) -> list[str]:
        """Rank 0's part, and nobody else's -> warnings. What is not kept is deleted beside training."""
        if self._mesh.rank != 0:
            return []
        _check_arrived(pending.partial, came)
        settings = self._training.config.checkpoint
        keep_last = 0 if pending.keep_all else settings.keep_last
        done = complete(pending.partial, final, files, keep_last, settings.keep_every)
        before = self._deleting
        self._deleting = in_thread("delete old checkpoints", lambda: _delete(before, done.dropped))
        return done.warnings


def _told(final: Path) -> str:
    return f"{final} could not be saved"


def _write(snapshot: Snapshot, partial: Path) -> Written:
    began_s = time.perf_counter()
    return Written(snapshot.write(partial), time.perf_counter() - began_s)


def _check_arrived(partial: Path, told: dict[str, FileEntry]) -> None:
    """See that files of other hosts are here with their digests, and reach this disk."""
    for name, found in told.items():
        if entry(partial / name) != found:
            raise CheckpointError(f"{name} did not arrive whole; see to the network and the storage")


def _delete(before: Future[None] | None, folders: list[Path]) -> None:
    if before is not None:
        before.result()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def in_thread(name: str, work: Callable[[], Result]) -> Future[Result]:
    """Begin `work` in a thread of its own, for which the end of the process does not wait."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def save_checkpoint(training: TrainState, step: int) -> Path:
    """Save all that the run is after `step`, at once -> its folder; every rank calls it, and writes its own part.

    Errors: CheckpointError, on all ranks alike, where one could not write; then what was saved before is as it was.
    """
    saver = AsyncSaver(training)
    saved = saver.save(step)
    saver.close()
    return saved.folder
