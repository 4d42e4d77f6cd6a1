"""Saves checkpoints while training continues: started at one step boundary, completed at a later one.

The steps of a save, on every rank:
1. `start_save`, at a step boundary: the tensors are copied to host memory, and a thread starts to write the copy to
   `step-NNNNNN.partial`. Training waits only for the copy.
2. At each later boundary every rank reports, in the one all-reduce that a step makes anyway, whether its files are
   written.
3. `finalize`, at the first boundary at which all ranks have reported so, or earlier if the checkpoint is needed now:
   rank 0 lists the files with sizes and digests in manifest.json and renames the folder. It does so in a thread, and
   the others wait in short collectives, so that slow storage cannot cause a collective to time out.

The threads call no collectives: the order of training's collectives stays the same on all ranks, and a checkpoint
becomes complete at the same step everywhere.
"""

import logging
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
from dist_moe.checkpoint.format.layout import PARTIAL, checkpoint_folder, complete, set_aside
from dist_moe.checkpoint.format.manifest import FileEntry, file_entry
from dist_moe.checkpoint.snapshot import Snapshot, StagingBuffer, collect
from dist_moe.comm.reduce import all_reduce_counts
from dist_moe.engine.train_state import TrainState

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_POLL_S = 5.0


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        step: Optimizer steps before it.
        folder: Its final folder.
        bytes: Total size of its files.
        stall_s: How long training stalled: the copy of the slowest rank, and this rank's wait in `finalize`.
        write_s: How long the slowest rank wrote its files.
        warnings: What else went wrong; none of it harms the checkpoint.
        replaced: Whether the checkpoints that it replaces were deleted.
    """

    step: int
    folder: Path
    bytes: int
    stall_s: float
    write_s: float
    warnings: tuple[str, ...] = ()
    replaced: bool = True


@dataclass(frozen=True)
class Written:
    """The files that one rank's thread has written, and how long that took."""

    files: dict[str, FileEntry]
    seconds: float


@dataclass(frozen=True)
class Pending:
    """A checkpoint whose files are being written.

    Attributes:
        step: Optimizer steps before it.
        partial: The folder that is written.
        keep_all: Whether no older checkpoint is deleted when this one is complete.
        replaces: Steps of older checkpoints to delete when this one is complete.
        writing: The thread's result.
        stall_s: How long training has stalled on this rank so far.
    """

    step: int
    partial: Path
    keep_all: bool
    replaces: tuple[int, ...]
    writing: Future[Written]
    stall_s: float


class AsyncSaver:
    """Saves the checkpoints of one run. `start_save`, `finalize` and `save` are collective calls.

    Args:
        train_state: The run.
        warn: Called with warnings that should be shown while ranks wait for slow storage.
    """

    def __init__(self, train_state: TrainState, warn: Callable[[str], None] = print) -> None:
        self._train_state = train_state
        self._warn = warn
        self._mesh = train_state.engine.mesh
        self._hosts = find_hosts(self._mesh, train_state.config.cluster.shared_storage)
        self._staging = StagingBuffer()
        self._pending: Pending | None = None
        self._deleting: Future[None] | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started and not completed; the same on all ranks."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank's thread has ended: its files of the pending checkpoint are written, or have failed."""
        return self._pending is not None and self._pending.writing.done()

    def start_save(
        self, step: int, keep_all: bool = False, asynchronous: bool = True, replaces: tuple[int, ...] = ()
    ) -> None:
        """Start to save the run after `step`; the previous checkpoint must have been finalized.

        Args:
            step: Optimizer steps done.
            keep_all: Whether to keep all older checkpoints, regardless of checkpoint.keep_last and keep_every.
            asynchronous: Whether training continues before `finalize`, so that the tensors must be copied. If false,
                nothing may change them before `finalize`.
            replaces: Steps of older checkpoints to delete when this one is complete, unless `keep_all`.

        Raises:
            CheckpointError: On every rank, if the save cannot start on one.
        """
        if self._pending is not None:
            raise RuntimeError(f"the checkpoint of step {self._pending.step} is not finished")
        started_s = time.perf_counter()
        final = checkpoint_folder(self._train_state.config, step)
        partial = final.with_name(final.name + PARTIAL)
        snapshots: list[Snapshot] = []

        def prepare() -> None:
            if self._hosts.is_host_leader(self._mesh.rank):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            snapshot = collect(self._train_state, step)
            snapshots.append(self._staging.copy(snapshot) if asynchronous else snapshot)

        try:
            run_on_all_ranks(self._mesh, _failure_of(final), prepare)
        except CheckpointError:
            if self._hosts.is_host_leader(self._mesh.rank):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        writing = run_in_thread(f"save step {step}", lambda: _write(snapshots[0], partial))
        replaced = () if keep_all else replaces
        self._pending = Pending(step, partial, keep_all, replaced, writing, time.perf_counter() - started_s)
        logger.debug("started to save step %d to %s, asynchronous=%s", step, partial, asynchronous)

    def finalize(self) -> Saved | None:
        """Wait until every rank has written its files, and complete the checkpoint.

        Returns:
            The checkpoint; None if none is pending.

        Raises:
            CheckpointError: On every rank, if one could not write; earlier checkpoints are unchanged.
        """
        pending, mesh = self._pending, self._mesh
        if pending is None:
            return None
        started_s = time.perf_counter()
        final = checkpoint_folder(self._train_state.config, pending.step)
        self._wait_for_all_ranks(pending.writing, pending.partial, "written its files")
        self._pending = None
        completing: Future[list[str]] | None = None
        try:
            results = run_on_all_ranks(
                mesh, _failure_of(final), lambda: (pending.writing.result(), pending.stall_s), tuple[Written, float]
            )
            fetched = self._fetch_remote_files(pending.partial, final, [written.files for written, _ in results])
            files = {name: entry for written, _ in results for name, entry in written.files.items()}
            completing = run_in_thread(
                f"complete step {pending.step}", lambda: self._complete(pending, final, files, fetched)
            )
            self._wait_for_all_ranks(completing, final, "completed it")
            warnings = run_on_all_ranks(mesh, _failure_of(final), completing.result, list[str])[0]
        finally:
            # The folder is left after a failure, and on hosts other than rank 0's. A thread may still complete it.
            if self._hosts.is_host_leader(mesh.rank) and (completing is None or completing.done()):
                shutil.rmtree(pending.partial, ignore_errors=True)
        return Saved(
            step=pending.step,
            folder=final,
            bytes=sum(entry.bytes for entry in files.values()),
            stall_s=max(stall_s for _, stall_s in results) + time.perf_counter() - started_s,
            write_s=max(written.seconds for written, _ in results),
            warnings=tuple(warnings),
            replaced=not pending.keep_all,
        )

    def save(self, step: int, keep_all: bool = False, replaces: tuple[int, ...] = ()) -> Saved:
        """Save the run after `step` and return when the checkpoint is complete.

        Raises:
            CheckpointError: As `start_save` and `finalize`.
        """
        self.start_save(step, keep_all, asynchronous=False, replaces=replaces)
        saved = self.finalize()
        assert saved is not None
        return saved

    def close(self) -> None:
        """Wait until this rank's thread has deleted the checkpoints that are not kept."""
        if self._deleting is not None:
            self._deleting.result()

    def _wait_for_all_ranks(self, work: Future[Any], folder: Path, action: str) -> None:
        """Wait for the thread of the slowest rank, in short collectives.

        Args:
            work: This rank's thread.
            folder: The folder of the checkpoint, for the warning.
            action: What the thread does, for the warning, such as "written its files".
        """
        limit_s = self._train_state.config.parallel.timeout_s
        started_s, warned = time.monotonic(), 0
        while True:
            # Well below the time limit of a collective, so that no rank is taken for hung.
            wait_for([work], timeout=min(MAX_POLL_S, limit_s / 4))
            own = torch.zeros(self._mesh.world_size, dtype=torch.int64)
            own[self._mesh.rank] = int(work.done())
            (done,) = all_reduce_counts([own], self._train_state.engine.device)
            slow = [rank for rank, flag in enumerate(done.tolist()) if not flag]
            if not slow:
                return
            waited_s = time.monotonic() - started_s
            if waited_s > limit_s * (warned + 1):
                warned += 1
                ranks = ", ".join(map(str, slow))
                self._warn(f"{folder}: after {waited_s:.0f} s rank {ranks} has not {action}; check the storage there")

    def _fetch_remote_files(
        self, partial: Path, final: Path, written: list[dict[str, FileEntry]]
    ) -> dict[str, FileEntry]:
        """Copy the files of other hosts to rank 0's, if storage is not shared; training waits. A collective call.

        Returns:
            The files that were copied.
        """
        transfers = [
            FileTransfer(name, entry.bytes, rank) for rank, files in enumerate(written) for name, entry in files.items()
        ]
        remote = [transfer for transfer in transfers if self._hosts.is_remote(transfer.owner)]
        if remote:
            mesh, device = self._mesh, self._train_state.engine.device
            target = partial if mesh.rank == 0 else None
            run_on_all_ranks(mesh, _failure_of(final), lambda: broadcast_files(remote, mesh, device, partial, target))
        return {transfer.name: written[transfer.owner][transfer.name] for transfer in remote}

    def _complete(
        self, pending: Pending, final: Path, files: dict[str, FileEntry], fetched: dict[str, FileEntry]
    ) -> list[str]:
        """Complete the checkpoint on rank 0, and start to delete those that are not kept.

        Returns:
            Warnings; none on other ranks.
        """
        if self._mesh.rank != 0:
            return []
        _check_fetched(pending.partial, fetched)
        settings = self._train_state.config.checkpoint
        keep_last = 0 if pending.keep_all else settings.keep_last
        completion = complete(pending.partial, final, files, keep_last, settings.keep_every)
        replaced = [set_aside(checkpoint_folder(self._train_state.config, step)) for step in pending.replaces]
        to_delete = [*completion.to_delete, *(folder for folder in replaced if folder is not None)]
        previous = self._deleting
        self._deleting = run_in_thread("delete old checkpoints", lambda: _delete(previous, to_delete))
        return completion.warnings


def _failure_of(final: Path) -> str:
    return f"{final} could not be saved"


def _write(snapshot: Snapshot, partial: Path) -> Written:
    started_s = time.perf_counter()
    return Written(snapshot.write(partial), time.perf_counter() - started_s)


def _check_fetched(partial: Path, expected: dict[str, FileEntry]) -> None:
    """Check the digests of files that came from other hosts, and flush them to disk."""
    for name, entry in expected.items():
        if file_entry(partial / name) != entry:
            raise CheckpointError(f"{name} did not arrive intact; check the network and the storage")


def _delete(previous: Future[None] | None, folders: list[Path]) -> None:
    if previous is not None:
        previous.result()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def run_in_thread(name: str, work: Callable[[], Result]) -> Future[Result]:
    """Start `work` in a daemon thread, which does not delay the end of the process."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def save_checkpoint(train_state: TrainState, step: int) -> Path:
    """Save the run after `step`, synchronously. A collective call: every rank writes its part.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: On every rank, if one could not write; earlier checkpoints are unchanged.
    """
    saver = AsyncSaver(train_state)
    saved = saver.save(step)
    saver.close()
    return saved.folder
