"""The folders of checkpoints: their names, how one becomes complete, which are kept, and what a crash left.

A checkpoint is written beside its place, verified, and then renamed. step-NNNNNN/model is a Hugging Face folder,
step-NNNNNN/state what resuming needs besides, and manifest.json, written last, tells a whole checkpoint from a part.
"""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_weights import write_index
from dist_moe.checkpoint.format.manifest import FileEntry, entry, sync_folder, write_manifest
from dist_moe.config import Config

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


@dataclass(frozen=True)
class Completion:
    """What is left to do: folders to delete, which no longer count as checkpoints, and warnings to tell."""

    dropped: list[Path]
    warnings: list[str]


def complete(partial: Path, final: Path, files: dict[str, FileEntry], keep_last: int, keep_every: int) -> Completion:
    """List the files of all ranks in manifest.json, let the folder take its name, and point `latest` at it.

    Errors: CheckpointError where a file is not there; OSError. Then nothing that was there before has changed.
    """
    index = write_index(partial / "model")
    if hidden := sorted(set(files) - {str(path.relative_to(partial)) for path in partial.rglob("*")}):
        remedy = "share run.dir among the hosts, or set cluster.shared_storage=false"
        raise CheckpointError(f"rank 0 does not see {', '.join(hidden)}; {remedy}")
    step = step_of(final)
    assert step is not None
    write_manifest(partial, step, files | {str(index.relative_to(partial)): entry(index)})
    dropped, warnings = _take_place(partial, final), []
    # The checkpoint is there; nothing that fails now does it any harm.
    try:
        _point_to(final)
    except OSError as error:
        warnings.append(f"{final.with_name(LATEST)} could not be written ({error})")
    with contextlib.suppress(OSError):
        for deleted in _drop(final, keep_last, keep_every):
            dropped.append(deleted)
    return Completion(dropped, warnings)


def _take_place(partial: Path, final: Path) -> list[Path]:
    """Give the folder its name -> the folder that had it, if any, under another one."""
    replaced = final.with_name(final.name + REPLACED)
    if not final.exists():
        os.replace(partial, final)
        return []
    # A crash between the two leaves a whole one under one of the names, which `recover` puts back.
    shutil.rmtree(replaced, ignore_errors=True)
    os.replace(final, replaced)
    try:
        os.replace(partial, final)
    except OSError:
        recover(final.parent)
        raise
    return [replaced]


def _point_to(final: Path) -> None:
    """Let `latest` name this checkpoint, and both reach the disk."""
    fresh = final.with_name(LATEST + PARTIAL)
    with fresh.open("w", encoding="utf-8") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, final.with_name(LATEST))
    sync_folder(final.parent)


def _drop(newest: Path, keep_last: int, keep_every: int) -> Iterator[Path]:
    """Rename what is not kept of those up to the newest -> each folder to delete. keep_last: 0 keeps all."""
    found = [(step, path) for step, path in checkpoints(newest.parent) if step <= (step_of(newest) or 0)]
    for step, path in found[:-keep_last] if keep_last else ():
        if not (keep_every and step % keep_every == 0):
            deleted = path.with_name(path.name + DELETED)
            shutil.rmtree(deleted, ignore_errors=True)
            os.replace(path, deleted)
            yield deleted


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


def archive_newer(chosen: Path) -> None:
    """Rename the checkpoints of run.dir that are later than the one it goes on from: it will make those steps anew.

    Nothing is deleted; the names end in .abandoned.
    """
    for step, path in checkpoints(chosen.parent):
        if step > (step_of(chosen) or 0):
            free = (path.with_name(f"{path.name}{ABANDONED}{number}") for number in itertools.count(1))
            os.replace(path, next(name for name in free if not name.exists()))
