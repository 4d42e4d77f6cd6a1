"""A terminal for rank 0 where the launch is on one: its live line is drawn there, and its log holds the text alone."""

import fcntl
import os
import pty
import re
import struct
import termios
import tty
from typing import TextIO

TERMINAL_VARIABLE = "DIST_MOE_TERMINAL"
"""Rows and columns of the launch's terminal, as 24x80."""
CONTROL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")
SHOW_CURSOR, CLEAR_LINE = "\x1b[?25h", "\r\x1b[2K"


def terminal_environment(stream: TextIO) -> dict[str, str]:
    """What tells the worker's minder of the terminal that `stream` is; nothing where it is none."""
    if not stream.isatty():
        return {}
    size = os.get_terminal_size(stream.fileno())
    return {TERMINAL_VARIABLE: f"{size.lines}x{size.columns}"}


def open_terminal(size: str) -> tuple[int, int]:
    """A new terminal that hands on what is written as it is -> where to read it, and where to write."""
    rows, columns = map(int, size.split("x"))
    reading, writing = pty.openpty()
    tty.setraw(writing)
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return reading, writing


def read_terminal(reading: int) -> bytes:
    """What has come; empty once nobody can write any more, which a terminal tells by an error."""
    try:
        return os.read(reading, 1 << 16)
    except OSError:
        return b""


class Transcript:
    """What is drawn on a terminal as lines of a log: no colours, nothing empty, a live line once for each change."""

    def __init__(self) -> None:
        self._rest = b""
        self._live = b""

    def receive(self, drawn: bytes) -> bytes:
        """The lines that are whole with this part; an empty part is the end."""
        parts = re.split(rb"([\r\n])", self._rest + (drawn or b"\n"))
        self._rest = parts.pop()
        lines = []
        for text, ended_by in zip(parts[::2], parts[1::2], strict=True):
            line = CONTROL.sub(b"", text).rstrip()
            if line and line != self._live:
                lines.append(line + b"\n")
            if line and ended_by == b"\r":
                self._live = line
        return b"".join(lines)
