"""The files that prepared tokens were made of, by size and SHA-256, so that one that has changed can be named."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_moe.data.cache import file_sha256
from dist_moe.data.sources import SourceRecord, combined_sha256, source_files
from dist_moe.errors import DataError

NAME = "sources.json"
MOST_NAMED = 3


def write_origin(folder: Path, records: Sequence[SourceRecord]) -> None:
    """List the files of all sources, after they were read.

    Errors: DataError where a file is not what it was when its source was recorded: the tokens are of neither.
    """
    listed: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        files = source_files(record.name)
        if files is None:
            continue
        digests = {name: file_sha256(path) for name, path in files}
        if combined_sha256(digests) != record.sha256:
            rule = "was changed while it was read"
            raise DataError(f"data source {record.name!r}", rule, "start again when nothing writes to its files")
        sizes = {name: path.stat().st_size for name, path in files}
        listed[record.name] = {name: {"bytes": sizes[name], "sha256": digests[name]} for name in digests}
    (folder / NAME).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def difference(before: Path, now: Path) -> str:
    """Which files differ between two folders of prepared tokens, in words; "" where that is not known."""
    try:
        old, new = (json.loads((folder / NAME).read_text(encoding="utf-8")) for folder in (before, now))
        found = [word for source in old for word in _words(old[source], new.get(source, {}))]
        found += [word for source in new if source not in old for word in _words({}, new[source])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return ", ".join(found[:MOST_NAMED]) + more


def _words(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for name in sorted({*old, *new}):
        if name not in new:
            found.append(f"{name} is gone")
        elif name not in old:
            found.append(f"{name} is new")
        elif old[name] != new[name]:
            found.append(f"{name} was changed ({old[name]['bytes']} bytes, now {new[name]['bytes']})")
    return found
