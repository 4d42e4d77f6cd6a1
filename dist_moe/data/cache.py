"""Where fetched sources and prepared tokens are kept, and the lock that lets processes share that place."""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder named by DIST_MOE_CACHE, or `~/.cache/dist_moe`; it need not exist yet."""
    named = environ.get("DIST_MOE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "dist_moe"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock `path` (made if absent, with its folders) while the block runs.

    The kernel frees the lock when its holder dies, so a killed process leaves no stale one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read piece by piece; OSError if it cannot be read."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
