"""Reads documents from local files: one per .txt file, one per line of a .jsonl file."""

import codecs
import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.errors import DataError, reason_of
from dist_moe.files import matching_paths
from dist_moe.text import format_bytes, listed
from dist_moe.untrusted import HALF_PAIR, printable, unique_keys

SUFFIXES = (".txt", ".jsonl")
UNPACKED_WITH = {
    **{".gz": "gunzip", ".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz"},
    **{".zip": "unzip", ".tar": "tar -xf", ".tgz": "tar -xzf"},
}
RECORDS = (".parquet", ".arrow", ".json", ".csv", ".tsv")
READ_FOLDER = "give this user permission to read it, or a pattern without it"
TO_JSONL = 'write its texts as one JSON object per line, {"text": "..."}, in a .jsonl file'
DOCUMENT_LINES = 'write one JSON object per line, {"text": "..."}, with "name" and "domain" if you have them'
LEAVE_OUT = "leave it out, for example by a glob that ends in .txt or .jsonl"
READ_BYTES = 1 << 20
# A line is parsed as a whole, at several times its size in memory.
LONGEST_LINE = 1 << 26


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        domain: What it belongs to; metrics may be kept for each domain.
        name: Decides its split, by a hash, so it should not depend on the position of the text.
        pieces: The content, in pieces of bounded size.
    """

    domain: str
    name: str
    pieces: Iterable[str]

    @property
    def text(self) -> str:
        """The whole content, in memory."""
        return "".join(self.pieces)


def pieces_of(text: str) -> tuple[str, ...]:
    """Return the pieces of a document whose whole text is in memory; none of an empty one."""
    return (text,) if text else ()


@dataclass(frozen=True)
class FileText:
    """The text of a UTF-8 file, read in pieces each time that it is iterated.

    Raises:
        DataError: On iteration, the file cannot be read or is not UTF-8.
    """

    path: Path

    def __iter__(self) -> Iterator[str]:
        decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
        with readable(self.path), self.path.open("rb") as file:
            while True:
                content = file.read(READ_BYTES)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(content, final=not content)
                except UnicodeDecodeError as error:
                    where = f"{_shown(self.path)}: byte {read - held + error.start}"
                    raise DataError(where, "is not UTF-8", "convert the file to UTF-8") from error
                if text := text.removeprefix("\ufeff") if not read else text:
                    yield text
                if not content:
                    return
                read += len(content)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        rule = f"cannot be read ({reason_of(error)})"
        raise DataError(_shown(path), rule, "make it readable for this user, or leave it out") from error


def local_files(pattern: str, suffixes: Sequence[str] = SUFFIXES, remedy: str = "") -> list[tuple[str, Path]]:
    """Return (name, path) of the files that a path or glob (with `**` too) matches, sorted by name.

    The name is the path below the fixed folder of the pattern, so moving that folder changes no name.

    Args:
        pattern: Of paths.
        suffixes: Of the files that can be read.
        remedy: What to do about a file with another suffix; "" for documents, whose remedy depends on the file.

    Raises:
        DataError: The pattern matches something else, a link to nothing, or a file twice under two names, or it looks
            into a folder that cannot be read.
    """
    try:
        folder, paths = matching_paths(pattern)
        paths = [path for path in paths if not path.is_dir()]
    except OSError as error:
        rule = f"has a folder that cannot be read ({reason_of(error)}: {printable(str(error.filename))})"
        raise DataError(f"data source {printable(pattern)!r}", rule, READ_FOLDER) from error
    _refuse_others(pattern, paths, suffixes, remedy)
    _refuse_twice(paths)
    return sorted((path.relative_to(folder).as_posix(), path) for path in paths)


def _refuse_others(pattern: str, paths: list[Path], suffixes: Sequence[str], remedy: str) -> None:
    """Refuse files that would not be read: nothing is left out without a word."""
    others: list[Path] = []
    missing: list[Path] = []
    special: list[Path] = []
    for path in sorted(paths):
        if path.suffix not in suffixes:
            others.append(path)
        elif not path.exists():
            missing.append(path)
        elif not path.is_file():
            special.append(path)
    if others and not remedy:
        is_given_by_name = len(paths) == 1 and str(paths[0]) == pattern
        is_convertible = is_given_by_name or others[0].suffix in {*UNPACKED_WITH, *RECORDS}
        remedy = conversion(others[0]) if is_convertible else LEAVE_OUT
    for found, rule, hint in (
        (others, f"which is not {listed(suffixes)}", remedy),
        (missing, "a link to a file that does not exist", "remove the link, or restore the file"),
        (special, "which is not a regular file", "leave it out, or write its content to a file"),
    ):
        if found:
            names = listed([_shown(path) for path in found], last="and", most=3)
            raise DataError(f"data source {printable(pattern)!r}", f"matches {names}, {rule}", hint)


def _refuse_twice(paths: Iterable[Path]) -> None:
    refuse_same_files((str(path), path) for path in sorted(paths))


def refuse_same_files(files: Iterable[tuple[str, Path]]) -> None:
    """Refuse a file that is given twice, under one name or two. Raises DataError."""
    seen: dict[tuple[int, int], str] = {}
    for name, path in files:
        with readable(path):
            status = path.stat()
        key = (status.st_dev, status.st_ino)
        if key in seen:
            both = f"{printable(seen[key])} and {printable(name)}"
            raise DataError(f"data.sources: {both}", "are one file, whose text would count twice", "give it once")
        seen[key] = name


def conversion(path: Path) -> str:
    """Return how to make a .txt or .jsonl file of a file with another suffix."""
    if path.suffix in UNPACKED_WITH:
        return f"unpack it with {UNPACKED_WITH[path.suffix]}"
    if path.suffix in RECORDS:
        return TO_JSONL
    return f"rename a text to .txt, or {TO_JSONL}"


def is_text_file(pattern: str) -> bool:
    """Whether a local source is the path of one .txt file, and so a domain of its own."""
    return pattern.endswith(".txt") and Path(pattern).is_file()


def read_local(pattern: str, files: list[tuple[str, Path]]) -> Iterator[Document]:
    """Yield the documents of `local_files`; of a text file, one piece is in memory at a time.

    A .txt file is one document; its domain is its stem where it is given by its own path, and the name of its folder
    where it is one of those that a glob matches. A .jsonl line has the field `text`, and may
    have `name` (else a hash of the text, so that equal texts are in one split) and `domain` (else the file's stem).

    Raises:
        DataError: With file:line, where a document cannot be read.
    """
    for name, path in files:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        else:
            domain = path.stem if is_text_file(pattern) else path.resolve().parent.name
            yield Document(domain, name, FileText(path))


def _read_jsonl(path: Path) -> Iterator[Document]:
    for location, entry in json_lines(path, DOCUMENT_LINES):
        yield _document(entry, path, location)


def json_lines(path: Path, remedy: str) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, value) of each line of a .jsonl file that is not empty.

    Args:
        path: In UTF-8.
        remedy: What to write instead of a line that is not JSON.

    Raises:
        DataError: With file:line, where a line is too long or not JSON, or has a key twice.
    """
    with readable(path), path.open("rb") as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            if line.strip():
                location = f"{_shown(path)}:{number}"
                yield location, _parse(line, location, remedy)


def _parse(line: bytes, location: str, remedy: str) -> Any:
    if len(line) > LONGEST_LINE:
        rule = f"is longer than {format_bytes(LONGEST_LINE)}"
        raise DataError(location, rule, "write shorter ones; a long document may be a .txt file of its own")
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except RecursionError:
        raise DataError(location, "is JSON that nests too deeply", remedy) from None
    except ValueError as error:
        raise DataError(location, f"is not valid JSON in UTF-8 ({error})", remedy) from error


def _document(entry: Any, path: Path, location: str) -> Document:
    if not isinstance(entry, dict) or "text" not in entry:
        raise DataError(location, "is not an object with the field 'text'", DOCUMENT_LINES)
    for key in ("text", "name", "domain"):
        value = entry.get(key, "")
        if not isinstance(value, str):
            raise DataError(location, f"has a field {key!r} that is not a string", DOCUMENT_LINES)
        if HALF_PAIR.search(value):
            raise DataError(location, f"has a field {key!r} with half of a surrogate pair", "write whole characters")
    content_hash = hashlib.sha256(entry["text"].encode()).hexdigest()[:16]
    return Document(entry.get("domain", path.stem), entry.get("name", content_hash), pieces_of(entry["text"]))


def _shown(path: Path) -> str:
    return printable(str(path))
