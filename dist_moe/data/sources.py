"""The sources of text by name: the interpreter's own library, Shakespeare, and local files."""

import difflib
import hashlib
import io
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_moe.data import shakespeare
from dist_moe.data.cache import file_sha256
from dist_moe.data.files import Document, local_files, read_local
from dist_moe.errors import DataError

BUILT_IN = ("stdlib-code", "shakespeare")
# Tests repeat one another, installed packages are not the library, and the build's own files differ from
# host to host.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")


@dataclass(frozen=True)
class SourceRecord:
    """What a source was when it was read, for the manifest: sha256 and size cover the files (or the archive)
    read."""

    name: str
    version: str
    sha256: str
    bytes: int


def fetch_sources(names: Sequence[str], cache: Path) -> list[SourceRecord]:
    """Fetch what is not yet in the cache folder, check it, and record it, in the order of `names`.

    Raises DataError for an unknown, repeated or unfetchable source, or for no source at all.
    """
    if not names:
        raise DataError("data.sources=[]", "names no source", f"name at least one, for example {BUILT_IN[0]}")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise DataError(f"data.sources={list(names)}", f"repeats {', '.join(repeated)}", "name each source once")
    return [_record(name, cache) for name in names]


def read_documents(name: str, cache: Path) -> Iterator[Document]:
    """The documents of a source in a fixed order, one in memory at a time; texts may be empty.

    Raises DataError for an unknown or unfetchable source and for a file that cannot be read as text.
    """
    if name == "stdlib-code":
        for path_name, path in _stdlib_files():
            content = path.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            yield Document("python", path_name, content.decode(encoding))
    elif name == "shakespeare":
        for work, text in shakespeare.read_shakespeare(shakespeare.shakespeare_archive(cache)):
            yield Document("drama", work, text)
    else:
        yield from read_local(_matched_files(name))


def source_files(name: str) -> list[tuple[str, Path]] | None:
    """(name, path) of the files that a source is made of; None for an archive. Errors: DataError where none are."""
    if name == "shakespeare":
        return None
    return _stdlib_files() if name == "stdlib-code" else _matched_files(name)


def combined_sha256(digests: Mapping[str, str]) -> str:
    """The SHA-256 of a source from those of its files by name, in their order."""
    listed = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256(listed.encode()).hexdigest()


def _record(name: str, cache: Path) -> SourceRecord:
    if name == "shakespeare":
        archive = shakespeare.shakespeare_archive(cache)
        return SourceRecord(name, shakespeare.VERSION, shakespeare.SHA256, archive.stat().st_size)
    if name == "stdlib-code":
        return _files_record(name, platform.python_version(), _stdlib_files())
    return _files_record(name, "local", _matched_files(name))


def _files_record(name: str, version: str, files: Sequence[tuple[str, Path]]) -> SourceRecord:
    sha256 = combined_sha256({path_name: file_sha256(path) for path_name, path in files})
    return SourceRecord(name, version, sha256, sum(path.stat().st_size for _, path in files))


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [each for each in inner if each not in SKIPPED_FOLDERS and not each.startswith(SKIPPED_PREFIXES)]
        for file_name in names:
            if file_name.endswith(".py") and not file_name.startswith(SKIPPED_PREFIXES):
                path = Path(folder, file_name)
                files.append((path.relative_to(root).as_posix(), path))
    if not files:
        raise DataError(
            f"data source 'stdlib-code' at {root}",
            "holds no .py files",
            "use an interpreter with its standard library as files, or another source",
        )
    return sorted(files)


def _matched_files(name: str) -> list[tuple[str, Path]]:
    files = local_files(name)
    if files:
        return files
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    if near:
        remedy = f"did you mean {near[0]!r}?"
    elif Path(name).expanduser().is_dir():
        remedy = f"name the files in the folder with a glob, such as {Path(name) / '**' / '*.txt'}"
    else:
        remedy = "give a built-in name, or a path or glob that matches at least one such file"
    raise DataError(
        f"data source {name!r}",
        f"is none of {', '.join(BUILT_IN)} and matches no .txt or .jsonl file",
        remedy,
    )
