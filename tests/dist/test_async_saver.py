"""Checkpoints that are written while training goes on: the bits of the step at which they were begun."""

import errno
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_moe.checkpoint.async_saver import AsyncSaver, Written
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import Completion, checkpoints, complete
from dist_moe.checkpoint.format.manifest import FileEntry, find_damage, read_manifest
from dist_moe.checkpoint.snapshot import StagingBuffer, collect
from dist_moe.comm.init import set_pg_timeouts
from dist_moe.train.rank_flags import RankFlags
from tests.dist.pool import RankPool
from tests.dist.resumable import overrides_of, same_bits, started, steps, train, write_text
from tests.dist.steps import one_step


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("stage", [0, 1])
def test_checkpoints_written_beside_training_have_the_bits_of_those_it_waits_for(
    ranks: RankPool, text: Path, tmp_path: Path, stage: int
) -> None:
    changes = ("train.steps=7", "checkpoint.interval=2", f"parallel.zero_stage={stage}", "train.precision=bf16")
    for asynchronous in ("true", "false"):
        ranks.run(train, 2, text, tmp_path / asynchronous, (*changes, f"checkpoint.asynchronous={asynchronous}"))
    assert [step for step, _ in checkpoints(tmp_path / "true/checkpoints")] == [2, 4, 6, 7]
    for step in ("2", "4", "6", "7"):
        name = f"checkpoints/step-{step:0>6}"
        assert same_bits(tmp_path / "true" / name, tmp_path / "false" / name) == []
    assert steps(tmp_path / "true")[7]["loss"] == steps(tmp_path / "false")[7]["loss"]


def overwritten(rank: int, world_size: int, text: Path, folder: Path) -> list[str]:
    """Copy everything, change everything, and look at the copy -> what of it has changed."""
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        one_step(resolved, training, 1)
        files = collect(training, 1).tensors.items()
        before = {(file, name): tensor.clone() for file, part in files for name, tensor in part.items()}
        copy = StagingBuffer().of(collect(training, 1))
        for step in (2, 3):
            one_step(resolved, training, step)
        now = collect(training, 3).tensors
        assert any(not torch.equal(now[file][name], tensor) for (file, name), tensor in before.items())
        return [name for (file, name), tensor in before.items() if not torch.equal(copy.tensors[file][name], tensor)]


def test_trap_T44_what_is_written_beside_training_is_a_copy(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    assert ranks.run(overwritten, 2, text, tmp_path) == [[], []]


def slow(rank: int, world_size: int, text: Path, folder: Path) -> tuple[list[bool], list[str], bool]:
    """Rank 1's storage takes three time limits of a collective: told by step, warnings, and whether it is complete."""
    with started(rank, world_size, overrides_of(text, folder, "parallel.timeout_s=1")) as (resolved, training):
        warnings: list[str] = []
        saver = AsyncSaver(training, warnings.append)
        saver.save_async(1)
        pending = saver._pending
        assert pending is not None
        written = pending.work.result(60)
        held: Future[Written] = Future()
        if rank == 1:
            saver._pending = replace(pending, work=held)
        told = [one_step(resolved, training, step, RankFlags(shard_written=saver.written)) for step in (2, 3)]
        if rank == 1:
            threading.Timer(3.0, held.set_result, (written,)).start()
        saved = saver.finalize()
        assert saved is not None
        dist.barrier()
        return told, warnings, (saved.folder / "manifest.json").is_file()


def ended_amid(rank: int, world_size: int, text: Path, folder: Path) -> list[str]:
    """A peer is gone while a thread completes a checkpoint: what is wrong with the folder afterwards."""
    release, waits = threading.Event(), AsyncSaver._await

    def held(*given: Any) -> Completion:
        release.wait(60)
        return complete(*given)

    def cut(saver: AsyncSaver, work: Future[Any], where: Path, done_is: str) -> None:
        if done_is == "completed it":
            raise RuntimeError("Connection closed by peer")
        waits(saver, work, where, done_is)

    with started(rank, world_size, overrides_of(text, folder, "checkpoint.keep_last=1")) as (_, training):
        saver = AsyncSaver(training)
        saver.save(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dist_moe.checkpoint.async_saver.complete", held)
            patch.setattr(AsyncSaver, "_await", cut)
            with pytest.raises(RuntimeError):
                saver.save(2)
            release.set()
            final, deadline = folder / "checkpoints/step-000002", time.monotonic() + 60
            while not final.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        manifest = read_manifest(final)
        return find_damage(final, manifest, manifest.files)


def test_a_checkpoint_that_is_being_completed_is_not_removed(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    assert ranks.run(ended_amid, 1, text, tmp_path / "run{7}") == [[]]


def lost_disk(rank: int, world_size: int, text: Path, folder: Path) -> tuple[str, list[str]]:
    """Rank 1's disk is full while the second of three checkpoints is written: the error, and what is left."""
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        saver = AsyncSaver(training)
        one_step(resolved, training, 1)
        saver.save(1)
        one_step(resolved, training, 2)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("dist_moe.checkpoint.snapshot.write_tensors", no_space)
            saver.save_async(2)
            one_step(resolved, training, 3)
            with pytest.raises(CheckpointError) as raised:
                saver.finalize()
        one_step(resolved, training, 4)
        saver.save(4)
        saver.close()
        dist.barrier()
        return str(raised.value), sorted(path.name for path in (folder / "checkpoints").iterdir())


def no_space(path: Path, _: dict[str, torch.Tensor]) -> Path:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_disk_that_is_full_on_one_rank_costs_all_the_same_checkpoint(
    ranks: RankPool, text: Path, tmp_path: Path
) -> None:
    """All ranks are told alike, the one before stays, and the next one is whole."""
    first, second = ranks.run(lost_disk, 2, text, tmp_path)
    assert first == second
    told, left = first
    assert "step-000002 could not be saved: [Errno 28] No space left on device" in told and "(rank 1)" in told
    assert left == ["latest", "step-000001", "step-000004"]


def completed_slowly(rank: int, world_size: int, text: Path, folder: Path) -> tuple[list[str], bool]:
    """Rank 0's disk takes three time limits of a collective to complete a checkpoint: warnings, and whether it did."""
    with started(rank, world_size, overrides_of(text, folder, "parallel.timeout_s=3")) as (_, training):
        warnings: list[str] = []
        set_pg_timeouts(3.0)

        def late(partial: Path, final: Path, files: dict[str, FileEntry], keep_last: int, every: int) -> Completion:
            time.sleep(9.0)
            return complete(partial, final, files, keep_last, every)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dist_moe.checkpoint.async_saver.complete", late)
            saver = AsyncSaver(training, warnings.append)
            saved = saver.save(1)
        dist.barrier()
        return warnings, (saved.folder / "manifest.json").is_file()


def test_a_slow_completion_is_told_and_is_no_hang(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    for warnings, there in ranks.run(completed_slowly, 2, text, tmp_path / "run{7}"):
        assert there and warnings and all("rank 0 has not completed it" in warning for warning in warnings)


def test_slow_storage_is_told_and_is_no_hang(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """No checkpoint is complete before the slowest rank has written, at the same step on all ranks."""
    for told, warnings, there in ranks.run(slow, 2, text, tmp_path):
        assert told == [False, False] and there
        assert warnings and all("rank 1 has not written its files" in warning for warning in warnings)
