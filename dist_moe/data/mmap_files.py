"""Files that a run has mapped: what each held when it was made, and whether it is still as it was opened.

A mapped file that gets shorter ends a process that reads it by SIGBUS, and one that is written to gives other text in
silence. So the content is compared when a run begins, and size and time of change before each step.
"""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dist_moe.comm.reduce import all_gather_objects
from dist_moe.errors import DataError

# Files up to this size are read whole. XXH3 reads 5 GB/s on one core (SHA-256: 0.3 to 2), so this costs 0.2 s.
WHOLE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 20
BLOCKS = 256


class MmapFile:
    """One file, held open as long as this lives: removed or replaced, it stays what it was for whom has mapped it."""

    def __init__(self, path: Path) -> None:
        """Errors: OSError where it cannot be opened."""
        self.path = path
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        self._opened = self._stamp()

    def array(self, dtype: str) -> np.ndarray:
        """All of the file, mapped to be read."""
        return np.memmap(self._file, dtype=dtype, mode="r")

    def change(self) -> str | None:
        """What has become of the file since it was opened; None where it is the same. A microsecond, no read."""
        try:
            bytes_now, time_now = self._stamp()
        except OSError as error:  # a network file system whose file was removed by another host
            return f"cannot be read any more ({error.strerror})"
        if bytes_now != self._opened[0]:
            return f"has {bytes_now} bytes instead of {self._opened[0]}"
        return None if time_now == self._opened[1] else "was written to"

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


def detect_change(files: Iterable[MmapFile]) -> str:
    """The first of the files that is not as it was opened, and in what; "" where all are."""
    return next((f"{file.path} {change}" for file in files if (change := file.change())), "")


def reject_change(change: str) -> None:
    """Tell all ranks of a change that any of them has seen. A collective call; change: as of `detect_change`.

    Errors: DataError, the same on all ranks.
    """
    for rank, seen in enumerate(all_gather_objects(change)):
        if seen:
            remedy = "start the run again: the tokens are made anew from their sources, and it goes on from here"
            raise DataError(seen, f"while the run was reading it (rank {rank})", remedy)


def content_digest(path: Path) -> str:
    """XXH3-128 in hexadecimal of a file's content and size; of large files, of blocks all over it.

    A change of a large file that keeps its size, and hits none of the blocks, is not found. Errors: OSError.
    """
    size = path.stat().st_size
    found = xxhash.xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        for start in _starts(size):
            file.seek(start)
            found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def _starts(size: int) -> Iterable[int]:
    """Where the blocks that are read begin: one after the other, or spread from the first to the last."""
    if size <= WHOLE_BYTES:
        return range(0, size, BLOCK_BYTES)
    return (index * (size - BLOCK_BYTES) // (BLOCKS - 1) for index in range(BLOCKS))


def same_content(folder: Path, digests: Any) -> bool:
    """Whether the files of a folder have these digests, by name. Errors: OSError, TypeError, AttributeError."""
    return all(content_digest(folder / name) == digest for name, digest in digests.items())
