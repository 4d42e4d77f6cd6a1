"""Finds the checkpoint that a path means: itself, or the latest of a run."""

import re
from pathlib import Path

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import LATEST, checkpoints
from dist_moe.checkpoint.format.manifest import NAME
from dist_moe.config.untrusted import read_text


def resolve_path(path: Path) -> Path:
    """The folder of a checkpoint or of a Hugging Face model: `path`, or the latest of its run or its checkpoints.

    Errors: CheckpointError where there is none.
    """
    if (path / NAME).exists() or (path / "config.json").exists():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path} is no checkpoint; give a run.dir, a step-NNNNNN folder of it, or a Hugging Face folder"
        )
    named = found[-1].parent / LATEST
    try:
        name = read_text(named, largest=100).strip()
    except (OSError, ValueError):
        return found[-1]
    is_one = re.fullmatch("step-[0-9]{6,18}", name) is not None and named.with_name(name).is_dir()
    return named.with_name(name) if is_one else found[-1]


def list_checkpoints(path: Path) -> list[Path]:
    """The checkpoints in a run.dir, or in its folder of checkpoints, in the order of their steps."""
    own = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return [folder for _, folder in checkpoints(own)]
