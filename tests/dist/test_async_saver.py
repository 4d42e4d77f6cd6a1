"""Checkpoints written while training continues hold the bits of the step at which the save started."""

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
from dist_moe.checkpoint.format.layout import Completion, complete, step_folders
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 0])
def test_asynchronous_and_synchronous_saves_have_equal_bits(
    ranks: RankPool, text: Path, tmp_path: Path, stage: int
) -> None:
    changes = ("train.steps=7", "checkpoint.interval=2", f"parallel.zero_stage={stage}", "train.precision=bf16")
    for asynchronous in ("true", "false"):
        ranks.run(train, 2, text, tmp_path / asynchronous, (*changes, f"checkpoint.asynchronous={asynchronous}"))
    assert [step for step, _ in step_folders(tmp_path / "true/checkpoints")] == [2, 4, 6, 7]
    for step in ("2", "4", "6", "7"):
        name = f"checkpoints/step-{step:0>6}"
        assert same_bits(tmp_path / "true" / name, tmp_path / "false" / name) == []
    assert steps(tmp_path / "true")[7]["loss"] == steps(tmp_path / "false")[7]["loss"]


def changed_copies(rank: int, world_size: int, text: Path, folder: Path) -> list[str]:
    """Copy a snapshot and train on -> names of the tensors of the copy that have changed."""
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        one_step(resolved, training, 1)
        files = collect(training, 1).tensors.items()
        before = {(file, name): tensor.clone() for file, part in files for name, tensor in part.items()}
        copy = StagingBuffer().copy(collect(training, 1))
        for step in (2, 3):
            one_step(resolved, training, step)
        now = collect(training, 3).tensors
        assert any(not torch.equal(now[file][name], tensor) for (file, name), tensor in before.items())
        return [name for (file, name), tensor in before.items() if not torch.equal(copy.tensors[file][name], tensor)]


def test_trap_T44_an_asynchronous_save_writes_a_copy(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    assert ranks.run(changed_copies, 2, text, tmp_path) == [[], []]


def write_slowly(rank: int, world_size: int, text: Path, folder: Path) -> tuple[list[bool], list[str], bool]:
    """Rank 1 writes for three time limits -> whether all had written after each step, warnings, whether complete."""
    with started(rank, world_size, overrides_of(text, folder, "parallel.timeout_s=1")) as (resolved, training):
        warnings: list[str] = []
        saver = AsyncSaver(training, warnings.append)
        saver.start_save(1)
        pending = saver._pending
        assert pending is not None
        written = pending.writing.result(60)
        delayed: Future[Written] = Future()
        if rank == 1:
            saver._pending = replace(pending, writing=delayed)
        all_written = [one_step(resolved, training, step, RankFlags(shard_written=saver.written)) for step in (2, 3)]
        if rank == 1:
            threading.Timer(3.0, delayed.set_result, (written,)).start()
        saved = saver.finalize()
        assert saved is not None
        dist.barrier()
        return all_written, warnings, (saved.folder / "manifest.json").is_file()


def fail_while_completing(rank: int, world_size: int, text: Path, folder: Path) -> list[str]:
    """A peer fails while a thread completes a checkpoint -> the damage of the folder afterwards."""
    release, wait_for_all_ranks = threading.Event(), AsyncSaver._wait_for_all_ranks

    def complete_after_release(*args: Any) -> Completion:
        release.wait(60)
        return complete(*args)

    def fail(saver: AsyncSaver, work: Future[Any], folder: Path, action: str) -> None:
        if action == "completed it":
            raise RuntimeError("Connection closed by peer")
        wait_for_all_ranks(saver, work, folder, action)

    with started(rank, world_size, overrides_of(text, folder, "checkpoint.keep_last=1")) as (_, training):
        saver = AsyncSaver(training)
        saver.save(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dist_moe.checkpoint.async_saver.complete", complete_after_release)
            patch.setattr(AsyncSaver, "_wait_for_all_ranks", fail)
            with pytest.raises(RuntimeError):
                saver.save(2)
            release.set()
            final, deadline = folder / "checkpoints/step-000002", time.monotonic() + 60
            while not final.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        manifest = read_manifest(final)
        return find_damage(final, manifest, manifest.files)


def test_finalize_does_not_remove_a_checkpoint_that_a_thread_completes(
    ranks: RankPool, text: Path, tmp_path: Path
) -> None:
    assert ranks.run(fail_while_completing, 1, text, tmp_path / "run{7}") == [[]]


def fill_disk_of_rank_1(rank: int, world_size: int, text: Path, folder: Path) -> tuple[str, list[str]]:
    """Rank 1's disk is full while the second of three checkpoints is written -> the error, and the folders left."""
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        saver = AsyncSaver(training)
        one_step(resolved, training, 1)
        saver.save(1)
        one_step(resolved, training, 2)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("dist_moe.checkpoint.snapshot.write_tensors", no_space)
            saver.start_save(2)
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


def test_a_full_disk_on_one_rank_raises_on_all_ranks(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """With the same error; the previous checkpoint remains, and the next one succeeds."""
    first, second = ranks.run(fill_disk_of_rank_1, 2, text, tmp_path)
    assert first == second
    message, left = first
    assert "step-000002 could not be saved: [Errno 28] No space left on device" in message and "(rank 1)" in message
    assert left == ["latest", "step-000001", "step-000004"]


def complete_slowly(rank: int, world_size: int, text: Path, folder: Path) -> tuple[list[str], bool]:
    """Rank 0 takes three time limits of a collective to complete a checkpoint -> warnings, and whether it did."""
    with started(rank, world_size, overrides_of(text, folder, "parallel.timeout_s=3")) as (_, training):
        warnings: list[str] = []
        set_pg_timeouts(3.0)

        def complete_late(
            partial: Path, final: Path, files: dict[str, FileEntry], keep_last: int, every: int
        ) -> Completion:
            time.sleep(9.0)
            return complete(partial, final, files, keep_last, every)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dist_moe.checkpoint.async_saver.complete", complete_late)
            saver = AsyncSaver(training, warnings.append)
            saved = saver.save(1)
        dist.barrier()
        return warnings, (saved.folder / "manifest.json").is_file()


@pytest.mark.slow
def test_a_slow_completion_warns_and_does_not_time_out(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    for warnings, is_complete in ranks.run(complete_slowly, 2, text, tmp_path / "run{7}"):
        assert is_complete and warnings and all("rank 0 has not completed it" in warning for warning in warnings)


def test_slow_storage_warns_and_does_not_time_out(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """No checkpoint is complete before the slowest rank has written, at the same step on all ranks."""
    for all_written, warnings, is_complete in ranks.run(write_slowly, 2, text, tmp_path):
        assert all_written == [False, False] and is_complete
        assert warnings and all("rank 1 has not written its files" in warning for warning in warnings)
