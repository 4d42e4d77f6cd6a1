"""The entry point of the command line: the app, with the commands of the other modules."""

import importlib
import os
import sys
from typing import Annotated

import typer

from dist_moe.cli.checkpoint import checkpoint_app
from dist_moe.cli.config import print_config
from dist_moe.cli.data import data_app
from dist_moe.cli.doctor import doctor
from dist_moe.cli.messages import report_lost_output, set_up_terminal
from dist_moe.cli.options import Verbose
from dist_moe.cli.results import compare, evaluate, generate, report
from dist_moe.cli.run import launch, train
from dist_moe.cli.study import study_app
from dist_moe.interpreter import hide_unused_packages
from dist_moe.status import open_closed_streams, write_any_character

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(launch)
app.command()(train)
app.command()(doctor)
app.command()(evaluate)
app.command()(generate)
app.command()(report)
app.command()(compare)
app.command("config")(print_config)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.add_typer(checkpoint_app, name="checkpoint")


def _print_version(asked: bool) -> None:
    if asked:
        from dist_moe import __version__

        print(f"dist-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train Mixture-of-Experts models on many workers, with balanced experts and no auxiliary loss."""


def main() -> None:
    """Run the command line, or exit with code 2 and a remedy if another distribution has replaced `dist_moe`.

    Exits with code 1 where the output cannot be written.
    """
    open_closed_streams()
    write_any_character()
    if foreign := foreign_package():
        print(foreign, file=sys.stderr)
        raise SystemExit(2)
    if "study" not in sys.argv:
        hide_unused_packages()
    set_up_terminal(os.environ, sys.stdout, sys.stderr)
    with report_lost_output():
        app(prog_name="dist-moe")


def foreign_package() -> str | None:
    """Return what is wrong with the `dist_moe` that Python imports: value, rule and remedy; None if it is ours.

    The distribution `dist-moe` on PyPI imports under the same name. Installing it overwrites our `__init__.py`, and
    uninstalling it removes our files.
    """
    package = importlib.import_module("dist_moe")
    if getattr(package, "DISTRIBUTION", None) == "dist-moe-train":
        return None
    return (
        f"dist_moe at {package.__file__} belongs to another distribution; the command dist-moe needs the dist_moe of "
        "dist-moe-train. Run `pip uninstall dist-moe`, then in the checkout of dist-moe-train `pip install "
        "--force-reinstall --no-deps -e .`; if a folder on PYTHONPATH holds another dist_moe, remove it from there"
    )


if __name__ == "__main__":
    main()
