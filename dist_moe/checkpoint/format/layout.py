"""The folders of checkpoints: their names, how one is found and completed, which are kept, and recovery after a crash.

A checkpoint is written to a temporary name, verified, and renamed. step-NNNNNN/model is a Hugging Face folder,
step-NNNNNN/state what resuming needs besides, and manifest.json, written last, marks the checkpoint as complete.
"""

import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_moe.checkpoint.errors import CheckpointError, without_remedy
from dist_moe.checkpoint.format.hf_weights import write_index
from dist_moe.checkpoint.format.manifest import (
    MANIFEST_NAME,
    FileEntry,
    file_entry,
    find_damage,
    read_manifest,
    write_manifest,
)
from dist_moe.config import Config
from dist_moe.errors import reason_of
from dist_moe.files import entries, exists, is_folder, write_atomically
from dist_moe.text import listed

logger = logging.getLogger(__name__)

LATEST = "latest"
PARTIAL, REPLACED, DELETED, ABANDONED = ".partial", ".replaced", ".deleted", ".abandoned-"


def checkpoints_root(config: Config) -> Path:
    """The folder of a run's checkpoints: run.dir/checkpoints."""
    return Path(config.run.dir) / "checkpoints"


def checkpoint_folder(config: Config, step: int) -> Path:
    """The folder of the checkpoint of `step`: run.dir/checkpoints/step-NNNNNN."""
    return checkpoints_root(config) / f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step in a folder's name; None if the name is not a checkpoint's."""
    match = re.fullmatch(r"step-(\d{6,})", folder.name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint in run.dir/checkpoints, in order; whether they are intact is not checked."""
    return sorted((step, path) for path in entries(root) if (step := step_of(path)) is not None and is_folder(path))


def list_checkpoints(path: Path) -> list[Path]:
    """The checkpoints in a run.dir, or in its `checkpoints` folder, in the order of their steps."""
    root = path / "checkpoints" if is_folder(path / "checkpoints") else path
    return [folder for _, folder in step_folders(root)]


def resolve_path(path: Path, read: tuple[str, ...] = ()) -> Path:
    """The folder that a path from the command line means: every command that takes a checkpoint calls this.

    Args:
        path: A checkpoint or a Hugging Face folder, which is returned as it is; or a run.dir or its `checkpoints`
            folder, of which the newest checkpoint is returned whose files have the sizes of its manifest.
        read: Beginnings of the names of files that must have the digests of the manifest too.

    Raises:
        CheckpointError: There is none.
        UnseenPathError: The path cannot be looked at.
    """
    if exists(path / MANIFEST_NAME) or exists(path / "config.json"):
        return path
    folders = list_checkpoints(path)
    if not folders:
        rule = "holds no checkpoint" if exists(path) else "does not exist, and nothing is fetched from a hub"
        raise CheckpointError(
            f"{path} {rule}; use a run.dir, a step-NNNNNN folder of it, or the folder of a Hugging Face model"
        )
    damaged: list[str] = []
    for folder in reversed(folders):
        damage = _damage(folder, read)
        if damage is None:
            for message in damaged:
                logger.warning("%s; using %s", message, folder.name)
            return folder
        damaged.append(damage)
    raise CheckpointError(f"no checkpoint in {path} can be used: {listed(damaged, last='and', most=3)}; restore one")


def _damage(folder: Path, read: tuple[str, ...]) -> str | None:
    """What is wrong with a checkpoint; None if it can be used."""
    try:
        manifest = read_manifest(folder)
        damage = find_damage(folder, manifest, manifest.files, digests=False)
        damage = damage or find_damage(folder, manifest, [name for name in manifest.files if name.startswith(read)])
    except CheckpointError as error:
        return without_remedy(error)
    return f"{folder} is damaged: {listed(damage, last='and', most=3)}" if damage else None


def weights_folder(checkpoint: Path) -> Path:
    """The Hugging Face folder of a checkpoint: its folder `model`, or itself."""
    return checkpoint / "model" if is_folder(checkpoint / "model") else checkpoint


@dataclass(frozen=True)
class Completion:
    """What remains to be done after a checkpoint is complete.

    Attributes:
        to_delete: Folders that are renamed already and no longer count as checkpoints.
        warnings: Messages to show.
    """

    to_delete: list[Path]
    warnings: list[str]


def complete(partial: Path, final: Path, files: dict[str, FileEntry], keep_last: int, keep_every: int) -> Completion:
    """Write the manifest, rename the folder, and point `latest` to it.

    Args:
        partial: The folder that all ranks have written.
        final: Its final name.
        files: The files of all ranks by path below the folder.
        keep_last: How many of the newest checkpoints to keep; 0 keeps all.
        keep_every: Keep the checkpoints of multiples of this step as well; 0 for none.

    Raises:
        CheckpointError: A file is not visible on this host.
        OSError: The folder cannot be written. Earlier checkpoints are unchanged after either error.
    """
    index = write_index(partial / "model")
    if invisible := sorted(set(files) - {str(path.relative_to(partial)) for path in partial.rglob("*")}):
        remedy = "share run.dir among the hosts, or set cluster.shared_storage=false"
        raise CheckpointError(f"rank 0 does not see {', '.join(invisible)}; {remedy}")
    step = step_of(final)
    assert step is not None
    write_manifest(partial, step, files | {str(index.relative_to(partial)): file_entry(index)})
    to_delete, warnings = _rename_to_final(partial, final), []
    # The checkpoint is complete from here on; a failure below does not harm it.
    try:
        _update_latest(final)
    except OSError as error:
        warnings.append(f"{final.with_name(LATEST)} could not be written ({reason_of(error)})")
    with contextlib.suppress(OSError):
        for deleted in _apply_retention(final, keep_last, keep_every):
            to_delete.append(deleted)
    return Completion(to_delete, warnings)


def _rename_to_final(partial: Path, final: Path) -> list[Path]:
    """Rename the folder -> the renamed folder that had its name before, if any."""
    replaced = final.with_name(final.name + REPLACED)
    if not final.exists():
        os.replace(partial, final)
        return []
    # After a crash between the two renames a complete checkpoint has one of the names; `recover` restores it.
    shutil.rmtree(replaced, ignore_errors=True)
    os.replace(final, replaced)
    try:
        os.replace(partial, final)
    except OSError:
        recover(final.parent)
        raise
    return [replaced]


def _update_latest(final: Path) -> None:
    """Write the checkpoint's name into `latest` atomically, and flush it and the folder to disk."""
    write_atomically(final.with_name(LATEST), final.name + "\n", durable=True)


def _apply_retention(newest: Path, keep_last: int, keep_every: int) -> Iterator[Path]:
    """Rename the checkpoints up to the newest that are not kept -> each folder to delete; as `complete`."""
    folders = [(step, path) for step, path in step_folders(newest.parent) if step <= (step_of(newest) or 0)]
    for step, path in folders[:-keep_last] if keep_last else ():
        if not (keep_every and step % keep_every == 0) and (deleted := set_aside(path)):
            yield deleted


def set_aside(folder: Path) -> Path | None:
    """Rename a checkpoint that is to be deleted, which no longer counts as one then -> its new name; None without it.

    Failing leaves it where it is.
    """
    deleted = folder.with_name(folder.name + DELETED)
    try:
        shutil.rmtree(deleted, ignore_errors=True)
        os.replace(folder, deleted)
    except OSError:
        return None
    return deleted


def recover(root: Path) -> None:
    """Finish or undo the renames and deletions that a crash interrupted in run.dir/checkpoints.

    An incomplete checkpoint (`.partial`) remains until the next save of its step, or until `find_checkpoint` removes
    and reports it.
    """
    for replaced in root.glob(f"step-*{REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, final)
    for deleted in root.glob(f"step-*{DELETED}"):
        shutil.rmtree(deleted, ignore_errors=True)
    for unfinished in root.glob(f".{LATEST}.*"):
        unfinished.unlink(missing_ok=True)


def archive_newer(resumed: Path) -> None:
    """Rename the checkpoints that are newer than the one that the run resumes from, as it will make those steps again.

    Nothing is deleted; the new names end in .abandoned-N.
    """
    for step, path in step_folders(resumed.parent):
        if step > (step_of(resumed) or 0):
            names = (path.with_name(f"{path.name}{ABANDONED}{number}") for number in itertools.count(1))
            os.replace(path, next(name for name in names if not name.exists()))
