"""The manifest: the list of every file of a complete checkpoint with its size and digest, written last.

The digest is XXH3 with 128 bits. It detects damage as reliably as a cryptographic digest, at the speed of reading.
Neither protects against a person who can write the files, because the manifest is stored with them.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import xxhash
from pydantic import Field, ValidationError

from dist_moe.checkpoint.errors import USE_ANOTHER, CheckpointError
from dist_moe.errors import reason_of
from dist_moe.files import is_folder, sync_folder, write_atomically
from dist_moe.section import Section, broken_fields
from dist_moe.untrusted import parse_json, printable, read_text

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
BLOCK_BYTES = 1 << 22


class FileEntry(Section):
    """One file: its size in bytes, and its XXH3-128 in hexadecimal."""

    bytes: int = Field(ge=0)
    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")


class Manifest(Section):
    """The content of manifest.json.

    Attributes:
        format: Version of the checkpoint format.
        step: Optimizer steps before the checkpoint.
        files: By path below the checkpoint's folder.
    """

    format: int
    step: int = Field(ge=0)
    files: dict[str, FileEntry]


def file_entry(path: Path) -> FileEntry:
    """Size and digest of the file, which is flushed to disk first."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(bytes=path.stat().st_size, xxh3_128=file_digest(path))


def write_manifest(folder: Path, step: int, files: dict[str, FileEntry]) -> None:
    """Write the manifest, and flush it and the directory entries of all files to disk."""
    path = folder / MANIFEST_NAME
    text = Manifest(format=FORMAT_VERSION, step=step, files=dict(sorted(files.items()))).model_dump_json(indent=1)
    write_atomically(path, text + "\n", durable=True)
    for inner in {folder, *(folder / name for name in files)}:
        sync_folder(inner if inner.is_dir() else inner.parent)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, or this version cannot use it.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(read_strict_json(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}: it is not a checkpoint, or not complete; use a step-NNNNNN folder of a "
            "run"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used ({reason_in_file(error)}); {USE_ANOTHER}") from None
    if manifest.format != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {manifest.format}, and this dist-moe reads format {FORMAT_VERSION}; use the version "
            "that wrote it"
        )
    outside = [name for name in manifest.files if not is_safe_path(name)]
    if outside:
        raise CheckpointError(f"{path} names files outside of its folder: {outside}; do not trust it")
    return manifest


def read_strict_json(path: Path) -> str:
    """Read a JSON file of ours as text, and reject what a lenient parser accepts: duplicate keys, and NaN.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is too large, not a regular file, or not strict JSON.
    """
    text = read_text(path)
    parse_json(text)
    return text


def find_unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """A message for each file in the folder that its manifest does not list."""
    if not is_folder(folder):
        return []
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    unlisted = sorted(present - {MANIFEST_NAME} - set(manifest.files))
    return [f"{printable(name)} is not in its {MANIFEST_NAME}" for name in unlisted]


def is_safe_path(name: str) -> bool:
    """Whether a path is relative, normalized, printable, and without `..`."""
    path = PurePosixPath(name)
    normalized = name == str(path) and name.isprintable() and "\\" not in name
    return normalized and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str], digests: bool = True) -> list[str]:
    """A message for each of the named files that is not as the manifest lists it; reads no file without `digests`."""
    damage = []
    for name in names:
        path, expected = folder / name, manifest.files[name]
        if os.path.islink(path) or not os.path.isfile(path):
            damage.append(f"{name} is missing")
        elif path.stat().st_size != expected.bytes:
            damage.append(f"{name} has {path.stat().st_size} bytes instead of {expected.bytes}")
        elif digests and digest_if_readable(path) != expected.xxh3_128:
            damage.append(f"{name} was changed, or cannot be read")
    return damage


def digest_if_readable(path: Path) -> str | None:
    """XXH3-128 of the file in hexadecimal; None if it cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return None


def file_digest(path: Path) -> str:
    """XXH3-128 of the file in hexadecimal.

    Raises:
        OSError: The file cannot be read.
    """
    digest, block = xxhash.xxh3_128(), bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def reason_in_file(error: Exception) -> str:
    """What is wrong with a file, in one line: the words of the system, the wrong fields, or the first line."""
    return broken_fields(error) if isinstance(error, ValidationError) else reason_of(error).partition("\n")[0]
