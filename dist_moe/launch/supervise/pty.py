"""A pseudo-terminal for rank 0 where the launch runs on a terminal: its live line is shown there, its log has text."""

import fcntl
import os
import pty
import re
import struct
import termios
import tty
from typing import TextIO

TERMINAL_VARIABLE = "DIST_MOE_TERMINAL"
"""Rows and columns of the launch's terminal, as in 24x80."""
CONTROL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")
"""Control sequences of ECMA-48: colors, cursor movements."""
SHOW_CURSOR, CLEAR_LINE = "\x1b[?25h", "\r\x1b[2K"
READ_BYTES = 1 << 16


def terminal_environment(stream: TextIO) -> dict[str, str]:
    """Return the variable that describes the terminal of `stream` to an agent; empty where it is not a terminal."""
    if not stream.isatty():
        return {}
    size = os.get_terminal_size(stream.fileno())
    return {TERMINAL_VARIABLE: f"{size.lines}x{size.columns}"}


def open_terminal(size: str) -> tuple[int, int]:
    """Open a pseudo-terminal in raw mode.

    Args:
        size: Rows and columns, as in 24x80.

    Returns:
        The file descriptors to read from and to write to.
    """
    rows, columns = map(int, size.split("x"))
    reading, writing = pty.openpty()
    tty.setraw(writing)
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return reading, writing


def read_terminal(reading: int) -> bytes:
    """Read from a pipe or a terminal; empty once no process has the other end open."""
    try:
        return os.read(reading, READ_BYTES)
    except OSError:  # EIO: how a terminal signals its end
        return b""


class Transcript:
    """Turns terminal output into log lines: no colors, no empty lines, a live line once per change."""

    def __init__(self) -> None:
        self._partial = b""
        self._live = b""

    def feed(self, output: bytes) -> bytes:
        """Return the lines that are complete with this part of the output; pass an empty part at the end."""
        parts = re.split(rb"([\r\n])", self._partial + (output or b"\n"))
        self._partial = parts.pop()
        lines = []
        for text, separator in zip(parts[::2], parts[1::2], strict=True):
            line = CONTROL.sub(b"", text).rstrip()
            if line and line != self._live:
                lines.append(line + b"\n")
            if line and separator == b"\r":
                self._live = line
        return b"".join(lines)
