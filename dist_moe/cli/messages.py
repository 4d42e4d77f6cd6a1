"""What commands write to stderr: errors of the user, and with --verbose the messages of the modules' loggers."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import typer
from rich.console import Console


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


def print_error(message: str) -> None:
    """Write a message to stderr without wrapping its lines, so that paths and values can be copied."""
    Console(stderr=True, style="bold red", highlight=False, markup=False, soft_wrap=True).print(message)
    sys.stderr.flush()
