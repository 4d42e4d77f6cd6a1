"""The command line of `dist-moe`, parsed without running anything."""

from typing import Any

import typer

from dist_moe.cli import main as cli


def parse(arguments: list[str]) -> dict[str, Any]:
    """The parameters that the command line makes of the arguments, without running anything.

    Raises:
        Exception: An unknown command or option, or a value of the wrong type, as the command line reports it.
    """
    command, rest = typer.main.get_command(cli.app), list(arguments)
    while rest and (inner := getattr(command, "commands", None)) is not None:
        word = rest.pop(0)
        if word.startswith("-"):
            options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
            assert word in options, f"no option {word}"
        else:
            assert word in inner, f"no command {word}; there are {sorted(inner)}"
            command = inner[word]
    if hasattr(command, "commands") or "--help" in rest:
        return {}
    try:
        return dict(command.make_context(command.name, rest).params)
    except typer.Exit:
        return {}
