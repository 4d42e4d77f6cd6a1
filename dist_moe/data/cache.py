"""The folder that fetched sources and tokenized documents are cached in, and the digests of its files."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_moe.errors import DataError, reason_of

REMEDY = "set DIST_MOE_CACHE to a folder that this user can write"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in the variable DIST_MOE_CACHE, or `~/.cache/dist_moe`; it may not exist yet.

    Raises:
        DataError: This user has no home folder.
    """
    named = environ.get("DIST_MOE_CACHE") or "~/.cache/dist_moe"
    try:
        return Path(named).expanduser()
    except RuntimeError:
        rule = f"has no home folder, in which {named} would be"
        raise DataError(f"the user {os.getuid()}", rule, REMEDY) from None


@contextlib.contextmanager
def needs_cache(cache: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DataError that names the cache folder."""
    try:
        yield
    except OSError as error:
        rule = f"cannot be written ({reason_of(error)}: {error.filename or cache})"
        raise DataError(f"the cache folder {cache}", rule, REMEDY) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in pieces. Raises OSError."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
