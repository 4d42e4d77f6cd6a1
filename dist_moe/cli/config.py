"""The command that checks and prints a configuration."""

from pathlib import Path
from typing import Annotated

import typer

from dist_moe.cli.messages import report_user_errors
from dist_moe.cli.options import ConfigFile, Overrides, Verbose, Workers


def print_reference(asked: bool) -> None:
    """Print the configuration reference and stop, if asked; before CONFIG is required."""
    if asked:
        from dist_moe.cli.reference import yaml_text

        print(yaml_text(), end="")
        raise typer.Exit


def print_config(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Workers = 1,
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
    """Check a run for a number of workers, and print it with every field filled in."""
    with report_user_errors():
        print(check_config(config, overrides, workers), end="")


def check_config(config: Path, overrides: list[str] | None, workers: int) -> str:
    """Return the complete configuration as YAML.

    Raises:
        ConfigError: With every rule that it breaks for this number of workers.
    """
    from dist_moe.config import dump_config, load_config, resolve

    return dump_config(resolve(load_config(config, overrides or (), workers), workers).config)
