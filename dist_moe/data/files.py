"""Reads documents from local files: one per .txt file, one per line of a .jsonl file."""

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from dist_moe.errors import DataError

SUFFIXES = (".txt", ".jsonl")
UNPACKED_WITH = {
    **{".gz": "gunzip", ".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz"},
    **{".zip": "unzip", ".tar": "tar -xf", ".tgz": "tar -xzf"},
}
RECORDS = (".parquet", ".arrow", ".json", ".csv", ".tsv")
TO_JSONL = 'write its texts as one JSON object per line, {"text": "..."}, in a .jsonl file'
# JSON can hold half of a surrogate pair (\ud800), UTF-8 cannot.
HALF_PAIR = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        domain: what it belongs to; metrics may be kept for each domain.
        name: decides its split, by a hash, so it should not depend on the position of the text.
        text: the content.
    """

    domain: str
    name: str
    text: str


def local_files(pattern: str) -> list[tuple[str, Path]]:
    """Return (name, path) of the .txt and .jsonl files that a path or glob (with `**` too) matches, sorted by name.

    The name is the path below the fixed folder of the pattern, so moving that folder changes no name.
    """
    expanded = Path(pattern).expanduser()
    if expanded.is_file():
        root, paths = expanded.parent, [expanded]
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), expanded.parts))
        paths = [Path(path) for path in glob.iglob(str(expanded), recursive=True)]
    kept = (path for path in paths if path.suffix in SUFFIXES and path.is_file())
    return sorted((path.relative_to(root).as_posix(), path) for path in kept)


def other_files(pattern: str) -> list[Path]:
    """Return the files that a path or glob matches, whatever their suffix, sorted."""
    expanded = Path(pattern).expanduser()
    matches = [expanded] if expanded.is_file() else map(Path, glob.iglob(str(expanded), recursive=True))
    return sorted(path for path in matches if path.is_file())


def conversion(path: Path) -> str:
    """Return how to make a .txt or .jsonl file of a file with another suffix."""
    if path.suffix in UNPACKED_WITH:
        return f"unpack it with {UNPACKED_WITH[path.suffix]}"
    if path.suffix in RECORDS:
        return TO_JSONL
    return f"rename a text to .txt, or {TO_JSONL}"


def read_local(files: list[tuple[str, Path]]) -> Iterator[Document]:
    """Yield the documents of `local_files`, one in memory at a time.

    A .txt file is one document, whose domain is the name of its folder. A .jsonl line has the field `text`, and may
    have `name` (else a hash of the text, so that equal texts are in one split) and `domain` (else the file's stem).

    Raises:
        DataError: with file:line, where a document cannot be read.
    """
    for name, path in files:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        else:
            yield Document(path.resolve().parent.name, name, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}", "is not UTF-8", "convert the file to UTF-8") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse(line, path, f"{path}:{number}")


def _parse(line: bytes, path: Path, location: str) -> Document:
    remedy = 'write one JSON object per line, {"text": "..."}, with "name" and "domain" if you have them'
    try:
        entry: Any = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(location, f"is not valid JSON in UTF-8 ({error})", remedy) from error
    if not isinstance(entry, dict) or "text" not in entry:
        raise DataError(location, "is not an object with the field 'text'", remedy)
    for key in ("text", "name", "domain"):
        value = entry.get(key, "")
        if not isinstance(value, str):
            raise DataError(location, f"has a field {key!r} that is not a string", remedy)
        if HALF_PAIR.search(value):
            raise DataError(location, f"has a field {key!r} with half of a surrogate pair", "write whole characters")
    content_hash = hashlib.sha256(entry["text"].encode()).hexdigest()[:16]
    return Document(entry.get("domain", path.stem), entry.get("name", content_hash), entry["text"])
