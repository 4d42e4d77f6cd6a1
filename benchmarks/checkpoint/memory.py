"""Measurements of time, of peak memory, and of the size of a folder."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import torch.distributed as dist

POLL_S = 0.002
Result = TypeVar("Result")


class Peak:
    """Measures the peak of anonymous memory in a block, relative to its start. Linux only.

    Memory-mapped pages of files are not included, since the kernel reclaims them when needed.

    Attributes:
        mib: The peak in MiB, available after the block.
    """

    mib = 0.0

    def __enter__(self) -> Self:
        self._start_kib = self._peak_kib = anonymous_kib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.mib = (self._peak_kib - self._start_kib) / 1024

    def _poll(self) -> None:
        while True:
            self._peak_kib = max(self._peak_kib, anonymous_kib())
            if self._stop.wait(POLL_S):
                return


class Cost(NamedTuple):
    """Time and peak of anonymous memory of an operation."""

    seconds: float
    peak_mib: float


def measure_cost(operation: Callable[[], Result]) -> tuple[Result, Cost]:
    """Run an operation on all ranks, between two barriers -> its result and its cost on this rank."""
    dist.barrier()
    with Peak() as peak:
        began_s = time.perf_counter()
        result = operation()
        dist.barrier()
        seconds = time.perf_counter() - began_s
    return result, Cost(seconds, peak.mib)


def anonymous_kib() -> int:
    """Return the anonymous memory of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
