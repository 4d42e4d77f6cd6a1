"""Lines that say what a command does before its work begins, printed before the imports that take seconds."""

import contextlib
import io
import sys


def print_status(line: str) -> None:
    """Print one line at once. A full disk or a closed pipe, where output goes there, ends nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


def write_any_character() -> None:
    r"""Let stdout and stderr write what their encoding lacks as `\uXXXX`, rather than raise UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
