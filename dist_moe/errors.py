"""Errors that are the user's to mend, first of all those of a configuration: all of its violations at once."""

import contextlib
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from dist_moe.text import shown


class Absent(Enum):
    """Stands for the value of a key that is not there."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


class Violation(NamedTuple):
    """One broken rule.

    key: dotted path (`parallel.expert_parallel`), or the path of a file.
    value: what stands there; `ABSENT` where nothing does.
    rule: the rule that is broken, worded to follow the value.
    remedy: what to do about it.
    """

    key: str
    value: Any
    rule: str
    remedy: str

    def __str__(self) -> str:
        subject = self.key if self.value is ABSENT else f"{self.key}={shown(self.value)}"
        return f"{subject} {self.rule}; {self.remedy}"


class UserError(Exception):
    """An error that is the user's to mend: its message says what, why and how, and a traceback would say no more."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; `violations` holds everything that is wrong with it."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = list(violations)
        super().__init__(self.violations)

    def __str__(self) -> str:
        return "\n".join(str(violation) for violation in self.violations)


class RunFolderError(UserError):
    """run.dir cannot be written when a run begins."""


@contextlib.contextmanager
def needs_folder(folder: Path) -> Iterator[None]:
    """Errors: RunFolderError in place of an OSError in the block."""
    try:
        yield
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error}: {error.filename or folder})"
        remedy = "name a folder on a disk that has room and may be written"
        raise RunFolderError(f"run.dir={folder} {rule}; {remedy}") from error


class DataError(UserError):
    """Data that cannot be fetched, read or split.

    value is what was met (a source name, `file:line`, a setting), rule what it breaks, remedy what to do
    about it.
    """

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(f"{value} {rule}; {remedy}")
        self.value = value
        self.rule = rule
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["DataError"], tuple[str, str, str]]:
        """Let the error cross a process border: the default would rebuild it from its one-line message
        alone."""
        return type(self), (self.value, self.rule, self.remedy)
