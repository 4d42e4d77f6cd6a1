"""Errors that the user can fix, first of all those of a configuration: all of its violations at once."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from dist_moe.text import shown


class Absent(Enum):
    """The value of a key that is missing, where None is a value of its own."""

    # Also its JSON where ranks exchange it; no text of a configuration holds a NUL.
    ABSENT = "\0absent"


ABSENT = Absent.ABSENT


class Violation(NamedTuple):
    """One broken rule.

    Attributes:
        key: Dotted path of the key (`parallel.expert_parallel`), or the path of a file.
        value: The value of the key; `ABSENT` where it has none.
        rule: The rule that is broken, worded to follow the value.
        remedy: How to fix it.
    """

    key: str
    value: Any
    rule: str
    remedy: str

    def __str__(self) -> str:
        subject = self.key if self.value is ABSENT else f"{self.key}={shown(self.value)}"
        return f"{subject} {self.rule}; {self.remedy}"


class UserError(Exception):
    """An error that the user can fix. Its message has value, rule and remedy, and is printed without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; `violations` holds everything that is wrong with it."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = list(violations)
        super().__init__(self.violations)

    def __str__(self) -> str:
        return "\n".join(str(violation) for violation in self.violations)


def reason_of(error: Exception) -> str:
    """Return the words of the system for an OSError, without its number and path, or else the text of the error."""
    return str(getattr(error, "strerror", None) or error)


class RunFolderError(UserError):
    """A folder for results, such as run.dir, cannot be written."""


@contextlib.contextmanager
def needs_folder(folder: Path, name: str = "run.dir", kind: str = "folder") -> Iterator[None]:
    """Turn an OSError of the block into a RunFolderError.

    Args:
        folder: The path that the user gave.
        name: The key or option that gives it.
        kind: What is at the path, a folder or a file.
    """
    try:
        yield
    except OSError as error:
        rule = f"cannot be written ({reason_of(error)}: {error.filename or folder})"
        remedy = f"set {name} to a {kind} on a disk with free space and write permission"
        # These two of os.path raise nothing, where those of pathlib do.
        if os.path.islink(folder) and not os.path.exists(folder):
            rule, remedy = (
                f"is a link to {folder.readlink()}, which does not exist",
                f"make that {kind}, or remove the link",
            )
        raise RunFolderError(f"{name}={folder} {rule}; {remedy}") from error


class DataError(UserError):
    """Data that cannot be fetched, read or split.

    Attributes:
        value: What is wrong (the name of a source, `file:line`, a setting).
        rule: The rule that is broken, worded to follow the value.
        remedy: How to fix it.
    """

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(f"{value} {rule}; {remedy}")
        self.value = value
        self.rule = rule
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["DataError"], tuple[str, str, str]]:
        """Pickle all three parts; the default would rebuild the error from its message alone."""
        return type(self), (self.value, self.rule, self.remedy)
