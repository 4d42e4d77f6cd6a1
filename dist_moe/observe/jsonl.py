"""A file of lines on a disk that may get full, read-only or lost: lines are whole, and no error ends the run."""

import os
from collections.abc import Callable
from pathlib import Path


class LineFile:
    """Appends lines to a file; an existing one is continued, and a last line without an end is cut off.

    It is open only while a line is written, so that it is the one that the path leads to, whatever was moved, unmounted
    or put in its place since. warn: told once when writing fails, once when it works again, and of a file that is gone.
    The lines of between are lost: a run does not wait for its disk.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._lost = 0

    def begin(self) -> None:
        """Make it, with its folders, or continue it. Errors: OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab"):
            pass
        _cut_unfinished_line(self.path)

    def write(self, line: str) -> None:
        """Append one line, which has to hold no line end. An error is told, not raised."""
        try:
            gone = not self.path.exists()
            if gone or self._lost:
                self.begin()
            self._append(line.encode() + b"\n")
        except OSError as error:
            if not self._lost:
                self._warn(f"{self.path} cannot be written ({error.strerror or error}); training goes on without it")
            self._lost += 1
            return
        if gone:
            self._warn(f"{self.path} was gone, and is begun anew")
        if self._lost:
            self._warn(f"{self.path} is written again; {self._lost} lines are lost")
            self._lost = 0

    def _append(self, content: bytes) -> None:
        """A full disk may take a part, which is cut off before the next line."""
        with self.path.open("ab", buffering=0) as file:
            written = 0
            while written < len(content):
                written += file.write(content[written:])


def _cut_unfinished_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position != end:
            file.truncate(position)
