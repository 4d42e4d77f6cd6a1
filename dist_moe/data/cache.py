"""The folder that fetched sources and tokenized documents are cached in, and the digests of its files."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in the variable DIST_MOE_CACHE, or `~/.cache/dist_moe`; it may not exist yet."""
    named = environ.get("DIST_MOE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "dist_moe"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in pieces. Raises OSError."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
