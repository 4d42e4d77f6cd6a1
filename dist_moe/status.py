"""Lines that say what a command does before its work begins, printed before the imports that take seconds."""

import contextlib
import io
import os
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


def open_closed_streams() -> None:
    """Open the null device in place of stdin, stdout and stderr where the caller has closed them, as `>&-` does.

    Their descriptors too: the next file that is opened would get one of them, and take the output of every child.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.set_inheritable(number, True)
            if null != number:
                os.close(null)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
