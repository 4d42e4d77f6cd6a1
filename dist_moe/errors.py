"""Errors that are the user's to mend, first of all those of a configuration: all of its violations at once."""

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_VALUE = 80


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


def shown(value: Any) -> str:
    """The value as one short line, written as YAML would write it."""
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_VALUE else line[: LONGEST_VALUE - 3] + "..."


def listed(values: Iterable[Any], last: str = "or") -> str:
    """`1, 2, 4 or 8`."""
    words = [str(value) for value in values]
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in order."""
    return [count for count in range(1, number + 1) if number % count == 0]


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelt most like `word`; None if none is close."""
    return next(iter(difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)), None)
