"""The arguments that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_moe.cli.messages import set_up_logging
from dist_moe.launch.launchers import launcher_names

if TYPE_CHECKING:
    Launcher = str
else:
    # typer shows the members as the accepted values.
    Launcher = StrEnum("Launcher", {name: name for name in launcher_names()})
DEFAULT_LAUNCHER = Launcher("deepspeed")


def _enable_messages(verbose: bool) -> bool:
    if verbose:
        set_up_logging()
    return verbose


def user_path(text: str | Path) -> Path:
    """Parse a path of the command line, or a default; a shell does not expand the `~` of `--out=~/x`."""
    from dist_moe.section import expand_home

    try:
        return Path(expand_home(str(text)))
    except ValueError as error:
        raise typer.BadParameter(f"{text} {error}") from None


def path_argument(metavar: str, meaning: str) -> Any:
    """Declare an argument that is a path."""
    return typer.Argument(metavar=metavar, parser=user_path, help=meaning)


def path_option(metavar: str, meaning: str, *names: str, hidden: bool = False) -> Any:
    """Declare an option that is a path; without names it has that of its parameter."""
    return typer.Option(*names, metavar=metavar, parser=user_path, help=meaning, hidden=hidden)


ConfigFile = Annotated[Path, path_argument("CONFIG", "YAML file of the run.")]
CheckpointFolder = Annotated[
    Path,
    path_argument("CHECKPOINT", "A step-NNNNNN folder, a run.dir (its newest checkpoint), or a Hugging Face folder."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace those of the file, such as train.steps=20."),
]
OutFolder = Annotated[Path, path_option("FOLDER", "Folder for the results; created if needed.")]
Repetitions = Annotated[int, typer.Option(min=1, max=1_000_000, help="Measurements of each kind and size.")]
AskedWorkers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Workers on this host (default: 2); a cluster in CONFIG has its own number."),
]
LauncherName = Annotated[Launcher, typer.Option("--launcher", help="The program that starts the workers.")]
Runner = Annotated[
    str | None,
    typer.Option(
        "--runner", help="How the deepspeed launcher reaches several hosts: pdsh (default), openmpi, mpich or slurm."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_enable_messages, help="Report on rank 0 what is decided, and why."),
]
