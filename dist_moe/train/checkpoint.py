"""Checkpoints: at step boundaries, one folder each, written beside its place, verified, and then renamed.

step-NNNNNN/model is a Hugging Face folder, step-NNNNNN/state what resuming needs besides, and manifest.json, written
last, tells a whole checkpoint from a part of one.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, dump_config
from dist_moe.train.elements import CheckpointError
from dist_moe.train.manifest import FileEntry, entry, sync_folder, write_manifest
from dist_moe.train.state import Training, write_state
from dist_moe.train.weights import write_index, write_shard

LATEST = "latest"
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
Result = TypeVar("Result")


def checkpoint_folder(config: Config, step: int) -> Path:
    """Where the checkpoint of `step` lies: run.dir/checkpoints/step-NNNNNN."""
    return Path(config.run.dir) / "checkpoints" / f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder is named after; None for one that is not a checkpoint's."""
    match = re.fullmatch(r"step-(\d{6,})", folder.name)
    return int(match[1]) if match else None


def save_checkpoint(training: Training, step: int) -> Path:
    """Save all that the run is after `step` -> its folder; every rank calls it, and writes its own part.

    It is complete when the call returns. Errors: CheckpointError, on all ranks alike, where one could not write; then
    what was saved before is as it was.
    """
    mesh, final = training.engine.mesh, checkpoint_folder(training.config, step)
    partial = final.with_name(final.name + PARTIAL)
    told = f"{final} could not be saved"
    together(mesh, told, lambda: _begin(partial) if mesh.rank == 0 else None)
    written = together(mesh, told, lambda: _write(training, step, partial))
    files = {name: found for part in written for name, found in part.items()}
    together(mesh, told, lambda: _complete(training.config, partial, final, files) if mesh.rank == 0 else None)
    return final


def together(mesh: Mesh, told: str, work: Callable[[], Result]) -> list[Result]:
    """Do `work` on every rank -> the result of each; CheckpointError on all of them where it fails on one."""
    result: Result | None = None
    failure = None
    try:
        result = work()
    except (OSError, SafetensorError, CheckpointError) as error:
        failure = str(error)
    answers = [(failure, result)]
    if mesh.world_size > 1:
        answers *= mesh.world_size
        dist.all_gather_object(answers, (failure, result))
    for rank, (failed, _) in enumerate(answers):
        if failed is not None:
            raise CheckpointError(f"{told}: {failed} (rank {rank})")
    return [found for _, found in answers]  # type: ignore[misc]  # None only where `work` returns it


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for inner in ("model", "state"):
        (partial / inner).mkdir(parents=True)


def _write(training: Training, step: int, partial: Path) -> dict[str, FileEntry]:
    """This rank's files, by path below the folder."""
    config, mesh = training.config, training.engine.mesh
    balanced = config.balance.policy not in ("none", "auxiliary")
    written = write_shard(training.task.model, mesh, partial / "model", balanced)
    written += write_state(training, step, partial / "state")
    if mesh.rank == 0:
        before = set((partial / "model").iterdir())
        training.prepared.tokenizer.save(partial / "model")
        written += set((partial / "model").iterdir()) - before
        (partial / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        written.append(partial / "config.yaml")
    return {str(path.relative_to(partial)): entry(path) for path in written}


def _complete(config: Config, partial: Path, final: Path, files: dict[str, FileEntry]) -> None:
    index = write_index(partial / "model")
    step = step_of(final)
    assert step is not None
    write_manifest(partial, step, files | {str(index.relative_to(partial)): entry(index)})
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        # A crash between the two leaves a whole one under one of the names, which `recover` puts back.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    fresh = final.with_name(LATEST + PARTIAL)
    fresh.write_text(final.name + "\n", encoding="utf-8")
    os.replace(fresh, final.with_name(LATEST))
    _thin_out(config, final)


def _thin_out(config: Config, newest: Path) -> None:
    """Delete what neither checkpoint.keep_last nor checkpoint.keep_every keeps, of those up to the newest."""
    settings = config.checkpoint
    found = [(step, path) for step, path in checkpoints(newest.parent) if step <= (step_of(newest) or 0)]
    for step, path in found[: -settings.keep_last] if settings.keep_last else ():
        if not (settings.keep_every and step % settings.keep_every == 0):
            deleted = path.with_name(path.name + DELETED)
            os.replace(path, deleted)
            shutil.rmtree(deleted, ignore_errors=True)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The steps that have a folder in run.dir/checkpoints, in order; whether one is good is another question."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((step, path) for path in found if (step := step_of(path)) is not None and path.is_dir())


def recover(folder: Path) -> None:
    """Put back what a crash left between two names."""
    for replaced in folder.glob(f"step-*{REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not final.exists():
            os.replace(replaced, final)
