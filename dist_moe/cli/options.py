"""The arguments that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
CheckpointFolder = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of the checkpoint.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace those of the file, such as train.steps=20."),
]
OutFolder = Annotated[Path, typer.Option(help="Folder for the results; created if needed.")]
Repetitions = Annotated[int, typer.Option(min=1, help="Measurements of each kind and size.")]
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
