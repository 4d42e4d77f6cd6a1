"""A file of lines that survives a full, read-only or lost disk: lines stay whole, and no error ends the run."""

import os
from collections.abc import Callable
from pathlib import Path

from dist_moe.errors import reason_of
from dist_moe.files import open_no_link
from dist_moe.text import counted

BLOCK_BYTES = 1 << 16


class LineFile:
    """Appends lines to a file, which may exist already.

    The file is open only while a line is written, so that lines follow the path when a disk is unmounted or the folder
    is replaced. Lines that cannot be written are lost, since training does not wait for a disk.

    Args:
        path: Of the file.
        warn: Called once when writing fails, once when it works again, and when the file has been removed.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._lost = 0

    def create(self) -> None:
        """Create the file and its folders, or cut an incomplete last line off an existing file.

        Raises:
            OSError: The file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", opener=open_no_link):
            pass
        _truncate_incomplete_line(self.path)

    def write(self, line: str) -> None:
        """Append one line, which must not contain a line break. An OSError becomes a warning."""
        try:
            removed = not self.path.exists()
            if removed or self._lost:
                self.create()
            # A name of a file that is not UTF-8 has half of surrogate pairs, which JSON can hold as escapes.
            self._append(line.encode(errors="backslashreplace") + b"\n")
        except OSError as error:
            if not self._lost:
                reason = reason_of(error)
                self._warn(f"cannot write {self.path} ({reason}); training continues, and its lines are lost")
            self._lost += 1
            return
        if removed:
            self._warn(f"{self.path} was removed, and has been created again")
        if self._lost:
            self._warn(f"{self.path} can be written again; {counted(self._lost, 'line')} lost")
            self._lost = 0

    def _append(self, content: bytes) -> None:
        # Unbuffered: a full disk may accept a part of the line, which the next `create` cuts off.
        with open(self.path, "ab", buffering=0, opener=open_no_link) as file:
            written = 0
            while written < len(content):
                written += file.write(content[written:])


def _truncate_incomplete_line(path: Path) -> None:
    """Remove what follows the last line break, searching backwards from the end in blocks."""
    with open(path, "rb+", opener=open_no_link) as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - BLOCK_BYTES)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position != end:
            file.truncate(position)
