"""Fills the template files of `dist_moe/launch/launchers/templates`, and writes commands for shell scripts."""

import re
import shlex
from collections.abc import Sequence
from importlib.resources import files

from dist_moe.worker.network import INTERFACE_VARIABLES

PLACEHOLDER = re.compile(r"@([A-Z][A-Z_]*)@")


def fill_template(template: str, /, **values: object) -> str:
    """Return a template file with each @NAME@ replaced by a value.

    A line with a value None is removed, which is how an optional field is left out.

    Args:
        template: The path of the file in `templates`, without its extension `.in`.
        values: The value of each placeholder, by its name in lower case.

    Raises:
        KeyError: A placeholder has no value.
        ValueError: A value has no placeholder.
    """
    text = (files("dist_moe.launch.launchers") / "templates" / f"{template}.in").read_text(encoding="utf-8")
    if unused := values.keys() - {found.lower() for found in PLACEHOLDER.findall(text)}:
        raise ValueError(f"{template} has no placeholder for {', '.join(sorted(unused))}")
    kept = [
        line
        for line in text.splitlines(keepends=True)
        if all(values[found.lower()] is not None for found in PLACEHOLDER.findall(line))
    ]
    # One pass, so that the text of a value is never taken for a placeholder.
    return PLACEHOLDER.sub(lambda match: str(values[match[1].lower()]), "".join(kept))


def shell_variable(name: str) -> str:
    """Return a word for a command that `shell_text` turns into a reference to the shell variable of that name."""
    return f"__{name}__"


# References that are not simply "$NAME".
REFERENCES = {"ARGS": '"$@"', "BIN": '"${PYTHON%/*}"', "FORWARD": "$FORWARD"}
ALL_ARGUMENTS = shell_variable("ARGS")
PYTHON = f"{shell_variable('BIN')}/python3"


def shell_text(text: str) -> str:
    """Return quoted shell text with the words of `shell_variable` replaced by references."""
    text = text.replace(PYTHON, '"$PYTHON"')
    return re.sub(r"__([A-Z]+(?:_[A-Z]+)*)__", lambda match: REFERENCES.get(match[1], f'"${match[1]}"'), text)


def shell_command(argv: Sequence[str]) -> str:
    """Return a command for a script: quoted, with variables, and one line for each long option."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return shell_text(" \\\n    ".join(" ".join(line) for line in lines))


def shell_exports(variables: dict[str, str]) -> str:
    """Return one `export` line for each variable; that of an interface keeps a value that the user has set."""
    texts = {name: shell_text(shlex.quote(value)) for name, value in variables.items()}
    kept = {name: f'"${{{name}:-{texts[name]}}}"' for name in INTERFACE_VARIABLES if name in texts}
    return "\n".join(f"export {name}={text}" for name, text in (texts | kept).items())
