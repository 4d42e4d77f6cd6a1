"""Records size and SHA-256 of the files that tokens were made of, so that a changed one can be named."""

import contextlib
import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_moe.data.cache import file_sha256
from dist_moe.data.files import readable
from dist_moe.data.sources import SourceRecord, combined_sha256, source_files
from dist_moe.errors import DataError
from dist_moe.files import write_atomically
from dist_moe.text import listed

NAME = "sources.json"
MAX_NAMED = 3
Content = tuple[int, str]


FilesOf = Callable[[str], list[tuple[str, Path]] | None]


def write_source_manifest(folder: Path, records: Sequence[SourceRecord], files_of: FilesOf = source_files) -> None:
    """Write sources.json with the files of all sources, as `files_of` finds them, after they were read.

    Raises:
        DataError: A file has changed since its source was recorded, so the tokens may be of either content.
    """
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        files = files_of(record.name)
        if files is None:
            continue
        digests = {name: file_sha256(path) for name, path in files}
        if combined_sha256(digests) != record.sha256:
            rule = "was changed while it was read"
            raise DataError(f"data source {record.name!r}", rule, "start again when no process writes to its files")
        sizes = {name: path.stat().st_size for name, path in files}
        entries[record.name] = {name: {"bytes": sizes[name], "sha256": digests[name]} for name in digests}
    write_atomically(folder / NAME, json.dumps(entries, indent=1) + "\n")


class Overlap(NamedTuple):
    """What sources have in common with those that tokens were made of earlier; an archive counts as one file.

    Attributes:
        shared: The number of their files that were tokenized.
        files: The number of their files.
        same: Sources with which the same documents are held out as earlier; None where the files are not the same.
    """

    shared: int
    files: int
    same: Sequence[str] | None


def compare_sources(
    sources: Sequence[str], earlier: Sequence[str], folder: Path, files_of: FilesOf = source_files
) -> Overlap:
    """Compare files under any name, by device and inode and by the recorded content.

    Args:
        sources: What to compare.
        earlier: The sources that tokens were made of; those that are not here are compared by content alone.
        folder: That of these tokens, which may be missing.
        files_of: Finds the files of a source.

    Raises:
        DataError: `sources` match nothing, or a file cannot be read.
    """
    recorded = _recorded(earlier, folder)
    contents = {content for _, content in recorded if content is not None}
    sizes = {size for size, _ in contents}
    known: set[Hashable] = set()
    for source in earlier:
        with contextlib.suppress(DataError):
            known.update(_files(source, files_of))
    keys: set[Hashable] = set()
    found: list[tuple[str, Content | None]] = []
    shared = 0
    for source in sources:
        for key, (name, path) in _files(source, files_of).items():
            content = _content(path, sizes)
            shared += key in known or content in contents
            keys.add(key)
            found.append((name, content))
    same = earlier if keys == known else sources if found == recorded else None
    return Overlap(shared, len(found), same)


def _files(source: str, files_of: FilesOf) -> dict[Hashable, tuple[str, Path | None]]:
    """Return name and path of the files of a source by device and inode; an archive has its name alone."""
    files = files_of(source)
    if files is None:
        return {source: (source, None)}
    found: dict[Hashable, tuple[str, Path | None]] = {}
    for name, path in files:
        with readable(path):
            status = path.stat()
        found[status.st_dev, status.st_ino] = (name, path)
    return found


def _content(path: Path | None, sizes: Collection[int]) -> Content | None:
    """Return size and SHA-256 of a file of one of these sizes; None for another one."""
    if path is None:
        return None
    with readable(path):
        size = path.stat().st_size
        return (size, file_sha256(path)) if size in sizes else None


def _recorded(sources: Sequence[str], folder: Path) -> list[tuple[str, Content | None]]:
    """Return name and content of the files in sources.json, in order; empty if they are not known."""
    try:
        entries = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files = [(source, entries.get(source)) for source in sources]
        return [
            (name, entry and (entry["bytes"], entry["sha256"]))
            for source, known in files
            for name, entry in (known or {source: None}).items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def describe_changes(before: Path, now: Path) -> str:
    """Name the source files that differ between two folders of tokens; "" if that is not known."""
    try:
        old, new = (json.loads((folder / NAME).read_text(encoding="utf-8")) for folder in (before, now))
        changes = [change for source in old for change in _changes(old[source], new.get(source, {}))]
        changes += [change for source in new if source not in old for change in _changes({}, new[source])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return listed(changes, last="and", most=MAX_NAMED)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changes = []
    for name in sorted({*old, *new}):
        if name not in new:
            changes.append(f"{name} was removed")
        elif name not in old:
            changes.append(f"{name} is new")
        elif old[name] != new[name]:
            changes.append(f"{name} was changed ({old[name]['bytes']} bytes, now {new[name]['bytes']})")
    return changes
