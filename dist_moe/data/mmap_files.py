"""Maps files, and detects that one was modified, by its digest when a run begins and by size and time at each step.

A process that reads a mapped file which has become shorter is ended by SIGBUS, and one that was written to silently
gives other text.
"""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dist_moe.comm.objects import all_gather_objects
from dist_moe.errors import DataError

# Files up to this size are read whole: 0.2 s, since XXH3 reads 5 GB/s on one core (SHA-256: 0.3 to 2 GB/s).
WHOLE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 20
BLOCKS = 256


class MmapFile:
    """A file that is held open, so that its content stays mapped even if it is removed or replaced."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError."""
        self.path = path
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        self._opened = self._stamp()

    def array(self, dtype: str) -> np.ndarray:
        """Map the whole file, read-only."""
        return np.memmap(self._file, dtype=dtype, mode="r")

    def change(self) -> str | None:
        """Say how the file was modified since it was opened; None if it was not. Takes a microsecond, reads nothing."""
        try:
            bytes_now, time_now = self._stamp()
        except OSError as error:  # a network file system whose file was removed by another host
            return f"can no longer be read ({error.strerror})"
        if bytes_now != self._opened[0]:
            return f"has {bytes_now} bytes instead of {self._opened[0]}"
        return None if time_now == self._opened[1] else "was written to"

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def detect_change(files: Iterable[MmapFile]) -> str:
    """Name the first file that was modified since it was opened, and how; "" if none was."""
    return next((f"{file.path} {change}" for file in files if (change := file.change())), "")


def reject_change(change: str) -> None:
    """Raise on all ranks where any of them has detected a change. A collective call.

    Args:
        change: The result of `detect_change` on this rank.

    Raises:
        DataError: The same on all ranks.
    """
    for rank, seen in enumerate(all_gather_objects(change, str)):
        if seen:
            remedy = "start the run again: it tokenizes the sources again, and resumes"
            raise DataError(seen, f"while the run was reading it (rank {rank})", remedy)


def content_digest(path: Path) -> str:
    """Return the XXH3-128 of the size and content of a file, in hexadecimal; of a large file, of evenly spread blocks.

    A change of a large file that keeps its size, and touches none of the blocks, is not detected. Raises OSError.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        for start in _block_starts(size):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _block_starts(size: int) -> Iterable[int]:
    """Return the offsets of the blocks to read: all, or `BLOCKS` from the first to the last byte of a large file."""
    if size <= WHOLE_BYTES:
        return range(0, size, BLOCK_BYTES)
    return (index * (size - BLOCK_BYTES) // (BLOCKS - 1) for index in range(BLOCKS))


def same_content(folder: Path, digests: Any) -> bool:
    """Whether the files of a folder have these digests, by name. Raises OSError, TypeError or AttributeError."""
    return all(content_digest(folder / name) == digest for name, digest in digests.items())
