"""Records size and SHA-256 of the files that tokens were made of, so that a changed one can be named."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_moe.data.cache import file_sha256
from dist_moe.data.sources import SourceRecord, combined_sha256, source_files
from dist_moe.errors import DataError
from dist_moe.files import write_atomically
from dist_moe.text import listed

NAME = "sources.json"
MAX_NAMED = 3


def write_source_manifest(folder: Path, records: Sequence[SourceRecord]) -> None:
    """Write sources.json with the files of all sources, after they were read.

    Raises:
        DataError: a file has changed since its source was recorded, so the tokens may be of either content.
    """
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        files = source_files(record.name)
        if files is None:
            continue
        digests = {name: file_sha256(path) for name, path in files}
        if combined_sha256(digests) != record.sha256:
            rule = "was changed while it was read"
            raise DataError(f"data source {record.name!r}", rule, "start again when no process writes to its files")
        sizes = {name: path.stat().st_size for name, path in files}
        entries[record.name] = {name: {"bytes": sizes[name], "sha256": digests[name]} for name in digests}
    write_atomically(folder / NAME, json.dumps(entries, indent=1) + "\n")


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
