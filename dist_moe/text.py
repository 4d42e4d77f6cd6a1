"""Formats values, lists and sizes for messages."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.filesize import decimal

MAX_VALUE_LENGTH = 200
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters with which a text could change what a terminal shows: controls, and changes of the direction."""
TYPES: Mapping[str, str] = {
    "NoneType": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}


def shown(value: Any) -> str:
    """Format a value as one line of at most `MAX_VALUE_LENGTH` characters, as YAML would write it.

    Of a longer one the middle is left out: a path is recognized by its end.
    """
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    line, half = " ".join(text.split()), (MAX_VALUE_LENGTH - 3) // 2
    return line if len(line) <= MAX_VALUE_LENGTH else f"{line[:half]}...{line[-half:]}"


def listed(values: Iterable[Any], last: str = "or", most: int | None = None) -> str:
    """Join values as in `1, 2, 4 or 8`.

    Args:
        values: What to list, each formatted by `str`.
        last: The word before the last value.
        most: How many values to write out; the others are counted, as in `1, 2 and 6 more`. None: all.
    """
    words = [str(value) for value in values]
    if most is not None and len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def type_words(name: str) -> str:
    """Return what YAML has for a type of Python: `a whole number` for `int`."""
    return TYPES.get(name, f"a {name}")


def up_to(last: int, first: int = 1) -> str:
    """Return `1 to 4`, or `1` where that is the only number."""
    return f"{first} to {last}" if last > first else str(first)


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending."""
    small = [count for count in range(1, math.isqrt(number) + 1) if number % count == 0]
    return small + [number // count for count in reversed(small) if count * count != number]


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate spelled most like `word`; None if none is as close as `cutoff`, from 0 to 1."""
    return next(iter(difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)), None)


def counted(count: int, noun: str) -> str:
    """Return `1 worker` or `2 workers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_bytes(size: float) -> str:
    """Format a number of bytes in decimal units: `7 bytes`, `1.5 kB`, `32.8 MB`."""
    return decimal(round(size))


def plain_text(text: str) -> str:
    """Show the control characters of a text as text, except line ends and tabs; a lone carriage return ends a line."""
    text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)
