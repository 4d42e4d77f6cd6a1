"""The command that checks and prints a configuration."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_moe.cli.messages import report_user_errors
from dist_moe.cli.options import ConfigFile, Overrides, Verbose

if TYPE_CHECKING:
    from dist_moe.config import Config, Resolved, Violation


def print_reference(asked: bool) -> None:
    """Print the configuration reference and stop, if asked; before CONFIG is required."""
    if asked:
        from dist_moe.cli.reference import yaml_text

        print(yaml_text(), end="")
        raise typer.Exit


def print_config(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of workers (processes, one per device). Without it, one is assumed, and what depends on the "
            "number is printed as auto.",
        ),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            callback=print_reference,
            is_eager=True,
            help="Print every field with its meaning, accepted values and default, and stop; needs no CONFIG.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Check a run, with the text it names, for a number of workers, and print it with every field filled in."""
    from dist_moe.cli.printed_config import printed
    from dist_moe.config import load_config

    with report_user_errors():
        resolved = check_config(config, overrides, workers or 1)
        from dist_moe.checkpoint.format.hf_weights import own_type_of_run
        from dist_moe.families.registry import family_of

        written = load_config(config, overrides or ())
        if own_type := own_type_of_run(resolved):
            print(f"# {own_type}")
        architecture = resolved.config.model.architecture
        if not family_of(architecture).separates_documents:
            from dist_moe.model.inputs import documents_line

            print(f"# {documents_line(architecture)}")
        print(printed(resolved, written, workers is not None), end="")


def check_config(
    config: Path, overrides: list[str] | None, workers: int, check_files: bool = True, notices: bool = True
) -> "Resolved":
    """Check everything that can be checked before a process starts.

    Args:
        config: The YAML file.
        overrides: Values that replace those of the file.
        workers: The number of workers.
        check_files: Whether the files that the configuration names are checked on this host.
        notices: Whether to print what is valid and not used as it is written.

    Raises:
        ConfigError: With every rule that it breaks for this number of workers.
    """
    from dist_moe.config import load_config, resolve

    further_check = files_violations if check_files else None
    resolved = resolve(load_config(config, overrides or (), workers, further_check), workers, further_check)
    if notices:
        print_notices(resolved)
    return resolved


def check_before_start(config: "Config", workers: int) -> None:
    """Check what needs no import of torch; where that is wrong, check all, so that the error lists all.

    The workers check the rest.

    Raises:
        ConfigError: With every rule that it breaks for this number of workers.
    """
    from dist_moe.config.resolve import plain_violations, resolve

    if plain_violations(config, workers) or files_violations(config):
        resolve(config, workers, files_violations)


def files_violations(config: "Config") -> "list[Violation]":
    """Return what is wrong with the files, folders and hosts that the configuration names, on this host."""
    from dist_moe.launch.cluster import cluster_violations
    from dist_moe.train.data_check import data_violations

    return [*data_violations(config), *cluster_violations(config.cluster)]


def print_notices(resolved: "Resolved") -> None:
    """Write what is valid and not used as it is written to stderr; one worker of a job writes it."""
    from dist_moe.worker.rank_info import rank_info_from_env

    if rank_info_from_env(os.environ).rank == 0:
        sys.stderr.writelines(f"notice: {line}\n" for line in resolved.notices)
        sys.stderr.flush()
