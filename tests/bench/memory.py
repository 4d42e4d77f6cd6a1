"""How much memory a block of code takes at most, and how large a folder is."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

EVERY_S = 0.002


class Peak:
    """In the block, the most anonymous memory above that at its start, looked at every 2 ms; `mib` has it afterwards.

    Pages of files that are mapped are the system's cache, which it takes back when it needs to. Linux.
    """

    mib = 0.0

    def __enter__(self) -> Self:
        self._before_kib = self._most_kib = anonymous_kib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.mib = (self._most_kib - self._before_kib) / 1024

    def _look(self) -> None:
        while True:
            self._most_kib = max(self._most_kib, anonymous_kib())
            if self._over.wait(EVERY_S):
                return


def anonymous_kib() -> int:
    """Of this process, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def folder_bytes(folder: Path) -> int:
    """Of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
