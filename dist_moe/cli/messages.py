"""What commands write to stderr: errors of the user, and with --verbose the messages of the modules' loggers."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from typing import TextIO

import typer
from rich.console import Console

from dist_moe.launch.supervise.pty import TERMINAL_VARIABLE

FORCED_COLOR = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE")
"""Variables by which rich and Typer write control codes to what is not a terminal."""
LOST_OUTPUT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE})
"""Errors of writing to a stream: no space, a quota, a limit of the size, a disk or terminal that is gone, no reader."""


def set_up_terminal(environment: MutableMapping[str, str], stdout: TextIO, stderr: TextIO) -> None:
    """Change the variables that rich and Typer read, so that control codes are written to terminals alone.

    NO_COLOR, which rich honours, is left as it is.

    Args:
        environment: The variables, as `os.environ`.
        stdout: The standard output.
        stderr: The standard error.
    """
    # OpenMPI gives its workers a terminal even where its own output goes to a file, and merges the lines of all.
    # Below an agent of a launch, the agent gives rank 0 a terminal if the launch has one.
    of_mpirun = "OMPI_COMM_WORLD_RANK" in environment and TERMINAL_VARIABLE not in environment
    if of_mpirun or not (stdout.isatty() and stderr.isatty()):
        for name in FORCED_COLOR:
            if name != "TTY_COMPATIBLE" or environment.get(name) != "0":
                environment.pop(name, None)
    if of_mpirun:
        environment["TTY_COMPATIBLE"] = "0"
    if of_mpirun or not stdout.isatty():
        # Typer writes control codes where GITHUB_ACTIONS is set.
        environment["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"


class _StderrHandler(logging.Handler):
    """Writes to the sys.stderr of the moment, which a worker and a test replace."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")
        sys.stderr.flush()


def set_up_logging() -> None:
    """Show the messages of this package's loggers from level INFO, on rank 0."""
    from dist_moe.worker.rank_info import rank_info_from_env

    logger = logging.getLogger("dist_moe")
    with contextlib.suppress(ValueError):
        # A rank that cannot be is reported by the command, with its remedy.
        rank = rank_info_from_env(os.environ, alone_in_batch=True).rank
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)


def is_verbose() -> bool:
    """Return whether messages are shown."""
    return any(isinstance(handler, _StderrHandler) for handler in logging.getLogger("dist_moe").handlers)


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Turn an error that the user can fix into its message and exit code 2, without a traceback."""
    from dist_moe.errors import UserError

    try:
        yield
    except UserError as error:
        print_error(str(error))
        raise typer.Exit(2) from None


@contextlib.contextmanager
def report_lost_output() -> Iterator[None]:
    """Exit with code 1 where the output cannot be written: with one line, or with none if its reader has ended."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # An error of a file that a command opens has its name.
        if error.filename is not None or error.errno not in LOST_OUTPUT:
            raise
        # What remains in the buffers would be tried again when the interpreter ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            with contextlib.suppress(OSError):
                print_error(f"the output cannot be written ({error.strerror}); write it to a disk with free space")
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, sys.stderr.fileno())
        raise SystemExit(1) from None


def print_error(message: str) -> None:
    """Write a message to stderr without wrapping its lines, so that paths and values can be copied."""
    sys.stderr.write(styled_error(message))
    sys.stderr.flush()


def styled_error(message: str) -> str:
    """Return the lines of an error message, in red on a terminal, with control characters as text."""
    from dist_moe.text import plain_text

    console = Console(stderr=True, style="bold red", highlight=False, markup=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(plain_text(message))
    return capture.get()
