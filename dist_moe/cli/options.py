"""What commands share: their arguments, and how they tell an error."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
CheckpointFolder = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of the checkpoint.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, such as train.steps=20."),
]
OutFolder = Annotated[Path, typer.Option(help="Folder for all that comes of it; made if it is not there.")]
Repetitions = Annotated[int, typer.Option(min=1, help="Measurements of each kind and size.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of workers (processes, one per device).")]


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Turns an error that is the user's to mend into its message and exit code 2, without a traceback."""
    from dist_moe.errors import UserError

    try:
        yield
    except UserError as error:
        print_error(str(error))
        raise typer.Exit(2) from None


def print_error(message: str) -> None:
    """Writes to stderr, and leaves the lines as they are: paths and values are there to be copied."""
    Console(stderr=True, style="bold red", highlight=False, markup=False, soft_wrap=True).print(message)
    sys.stderr.flush()
