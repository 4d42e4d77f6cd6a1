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
PASSED = re.compile(r"\x1b\[(?:[0-9;]*[ABCDEFGHJKm]|\?25[hl])")
"""Control sequences that are shown: movements in the window, erasing, colors, and the cursor's visibility."""
ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # a control sequence
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # a string: title, clipboard, link, device control
    r"|\x1b[ -/]*[0-~]"  # any other escape
    r"|[\x00-\x07\x0b-\x0c\x0e-\x1f\x7f-\x9f]"  # with a lone ESC, which would join what follows a removed escape
)
PENDING = re.compile(r"\x9b[0-?]*[ -/]*\Z|\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)\Z")
MAX_PENDING = 4096
LINE_END = re.compile(rb"(\r*\n|\r(?!\Z))")
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


class TerminalFilter:
    """Removes from terminal output what does more than move within the window, erase, and color.

    Titles, the clipboard, links, reports that a terminal would type as input, and resets are removed.
    """

    def __init__(self) -> None:
        self._pending = ""

    def feed(self, text: str) -> str:
        """Return what of this part of the output may be shown; an escape that is not complete waits for the next."""
        text, self._pending = self._pending + text, ""
        if (incomplete := PENDING.search(text)) is not None:
            text = text[: incomplete.start()]
            # A string without an end is dropped as it grows, and what follows it is shown as text.
            self._pending = incomplete[0][:MAX_PENDING]
        return ESCAPE.sub(lambda match: match[0] if PASSED.fullmatch(match[0]) else "", text)


class Transcript:
    """Turns terminal output into log lines: no colors, no empty lines, and none of a live line that is redrawn."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, output: bytes) -> bytes:
        """Return the lines that are complete with this part of the output; pass an empty part at the end."""
        # A carriage return at the end of a part may belong to a line feed that follows.
        parts = LINE_END.split(self._partial + (output or b"\n"))
        self._partial = parts.pop()
        lines = []
        for text, separator in zip(parts[::2], parts[1::2], strict=True):
            line = CONTROL.sub(b"", text).rstrip()
            # What a carriage return follows is drawn over.
            if line and separator != b"\r":
                lines.append(line + b"\n")
        return b"".join(lines)
