"""What a complete checkpoint consists of: every file with its size and digest, written last.

The digest is XXH3 with 128 bits. It finds damage as surely as a cryptographic one at the speed of reading, and neither
would stop somebody who can write the files, since the manifest lies beside them.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import xxhash
from pydantic import Field

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.config.base import Section
from dist_moe.config.untrusted import parse_json, printable, read_text

NAME = "manifest.json"
FORMAT = 2
BLOCK_BYTES = 1 << 22


class FileEntry(Section):
    """One file: its size in bytes, and XXH3-128 in hexadecimal."""

    bytes: int = Field(ge=0)
    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")


class Manifest(Section):
    """format: of the checkpoint as a whole. step: the optimizer steps before it. files: by path below its folder."""

    format: int
    step: int = Field(ge=0)
    files: dict[str, FileEntry]


def entry(path: Path) -> FileEntry:
    """What the file is now; it has reached the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(bytes=path.stat().st_size, xxh3_128=file_digest(path))


def write_manifest(folder: Path, step: int, files: dict[str, FileEntry]) -> None:
    """Write it, and let it and the names of all files reach the disk."""
    path = folder / NAME
    text = Manifest(format=FORMAT, step=step, files=dict(sorted(files.items()))).model_dump_json(indent=1)
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    for inner in {folder, *(folder / name for name in files)}:
        sync_folder(inner if inner.is_dir() else inner.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> Manifest:
    """CheckpointError where there is none, or none that this version can use."""
    try:
        manifest = Manifest.model_validate_json(read_small(folder / NAME))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {NAME}: it is no checkpoint, or not a whole one; give a step-NNNNNN folder of a run"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / NAME} cannot be used ({first_line(error)}); use another checkpoint") from None
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{folder / NAME} is of format {manifest.format}, and this dist-moe reads format {FORMAT}; use the version "
            "that wrote it"
        )
    outside = [name for name in manifest.files if not lies_below(name)]
    if outside:
        raise CheckpointError(f"{folder / NAME} names files outside of its folder: {outside}; do not trust it")
    return manifest


def read_small(path: Path) -> str:
    """A JSON file of ours. Errors: OSError, and ValueError for anything that is too large, or not a file at all.

    Also for what a parser would pass over: a key that is given twice, a number that is none.
    """
    text = read_text(path)
    parse_json(text)
    return text


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """What lies in the folder and is not in its manifest, in words."""
    if not folder.is_dir():
        return []
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    return [f"{printable(name)} is not in its {NAME}" for name in sorted(there - {NAME} - set(manifest.files))]


def lies_below(name: str) -> bool:
    """Whether a path is relative, and stays below where it starts."""
    path = PurePosixPath(name)
    plain = name == str(path) and name.isprintable() and "\\" not in name
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of the manifest, in words; nothing where they are as they were written."""
    found = []
    for name in names:
        path, told = folder / name, manifest.files[name]
        if path.is_symlink() or not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != told.bytes:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {told.bytes}")
        elif digest(path) != told.xxh3_128:
            found.append(f"{name} was changed, or cannot be read")
    return found


def digest(path: Path) -> str | None:
    """XXH3-128 in hexadecimal; None for a file that cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return None


def file_digest(path: Path) -> str:
    """XXH3-128 in hexadecimal; OSError for a file that cannot be read."""
    found, block = xxhash.xxh3_128(), bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(memoryview(block)[:count])
    return found.hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]
