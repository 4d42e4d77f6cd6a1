"""Text for messages: values, lists, the nearest word."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from rich.filesize import decimal

LONGEST_VALUE = 80


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


def counted(count: int, noun: str) -> str:
    """Return `1 worker` or `2 workers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_bytes(size: float) -> str:
    """Format a number of bytes in decimal units: `7 bytes`, `1.5 kB`, `32.8 MB`."""
    return decimal(round(size))
