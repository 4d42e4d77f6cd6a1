"""Checkpoints: at step boundaries, one folder each, written beside its place, verified, and then renamed.

step-NNNNNN/model is a Hugging Face folder, step-NNNNNN/state what resuming needs besides, and manifest.json, written
last, tells a whole checkpoint from a part of one.
"""

import contextlib
import itertools
import os
import re
import shutil
from pathlib import Path

from dist_moe.config import Config, dump_config
from dist_moe.train.apart import Parcel, deliver, find_hosts
from dist_moe.train.elements import CheckpointError
from dist_moe.train.manifest import FileEntry, entry, sync_folder, write_manifest
from dist_moe.train.state import Training, write_state
from dist_moe.train.together import together
from dist_moe.train.weights import write_index, write_shard

LATEST = "latest"
PARTIAL, REPLACED, DELETED, ABANDONED = ".partial", ".replaced", ".deleted", ".abandoned-"


def own_folder(config: Config) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(config.run.dir) / "checkpoints"


def checkpoint_folder(config: Config, step: int) -> Path:
    """Where the checkpoint of `step` lies: run.dir/checkpoints/step-NNNNNN."""
    return own_folder(config) / f"step-{step:06d}"


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
    hosts = find_hosts(mesh, training.config.cluster.shared_storage)
    partial = final.with_name(final.name + PARTIAL)
    told = f"{final} could not be saved"
    try:
        together(mesh, told, lambda: _begin(partial) if hosts.leads(mesh.rank) else None)
        written = together(mesh, told, lambda: _write(training, step, partial))
        parcels = [Parcel(name, found.bytes, rank) for rank, part in enumerate(written) for name, found in part.items()]
        far = [parcel for parcel in parcels if hosts.far(parcel.owner)]
        if far:
            here = partial if mesh.rank == 0 else None
            together(mesh, told, lambda: deliver(far, mesh, training.engine.device, partial, here))
        files = {name: found for part in written for name, found in part.items()}
        together(mesh, told, lambda: _complete(training.config, partial, final, files) if mesh.rank == 0 else None)
    finally:
        if hosts.leads(mesh.rank):
            shutil.rmtree(partial, ignore_errors=True)  # after a failure, or on a host that is not rank 0's
    return final


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
    if hidden := sorted(set(files) - {str(path.relative_to(partial)) for path in partial.rglob("*")}):
        remedy = "share run.dir among the hosts, or set cluster.shared_storage=false"
        raise CheckpointError(f"rank 0 does not see {', '.join(hidden)}; {remedy}")
    step = step_of(final)
    assert step is not None
    write_manifest(partial, step, files | {str(index.relative_to(partial)): entry(index)})
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        # A crash between the two leaves a whole one under one of the names, which `recover` puts back.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    try:
        os.replace(partial, final)
    except OSError:
        recover(final.parent)
        raise
    _point_to(final)
    shutil.rmtree(replaced, ignore_errors=True)
    with contextlib.suppress(OSError):  # the checkpoint is there; what stays too long does no harm
        _thin_out(config, final)


def _point_to(final: Path) -> None:
    """Let `latest` name this checkpoint, and both reach the disk."""
    fresh = final.with_name(LATEST + PARTIAL)
    with fresh.open("w", encoding="utf-8") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, final.with_name(LATEST))
    sync_folder(final.parent)


def _thin_out(config: Config, newest: Path) -> None:
    """Delete what neither checkpoint.keep_last nor checkpoint.keep_every keeps, of those up to the newest."""
    settings = config.checkpoint
    found = [(step, path) for step, path in checkpoints(newest.parent) if step <= (step_of(newest) or 0)]
    for step, path in found[: -settings.keep_last] if settings.keep_last else ():
        if not (settings.keep_every and step % settings.keep_every == 0):
            deleted = path.with_name(path.name + DELETED)
            shutil.rmtree(deleted, ignore_errors=True)
            os.replace(path, deleted)
            shutil.rmtree(deleted, ignore_errors=True)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The steps that have a folder in run.dir/checkpoints, in order; whether one is good is another question."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((step, path) for path in found if (step := step_of(path)) is not None and path.is_dir())


def recover(folder: Path) -> None:
    """Put back what a crash left between two names, and remove what it left of something that is there or was not kept.

    An unfinished checkpoint stays until the next one of its step, or until it is named by `find_checkpoint`.
    """
    for replaced in folder.glob(f"step-*{REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, final)
    for deleted in folder.glob(f"step-*{DELETED}"):
        shutil.rmtree(deleted, ignore_errors=True)


def set_later_aside(chosen: Path) -> None:
    """Rename the checkpoints of run.dir that are later than the one it goes on from: it will make those steps anew.

    Nothing is deleted; the names end in .abandoned.
    """
    for step, path in checkpoints(chosen.parent):
        if step > (step_of(chosen) or 0):
            free = (path.with_name(f"{path.name}{ABANDONED}{number}") for number in itertools.count(1))
            os.replace(path, next(name for name in free if not name.exists()))
