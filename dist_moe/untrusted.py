"""Reads text and JSON as untrusted input: of bounded size, without blocking, and refusing what is ambiguous."""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

LARGEST_TEXT = 1 << 26
# Of an integer, in any base up to 16. The largest fields have 64 bits, and Python prints no integer of 4,300 digits.
MAX_DIGITS = 1000
# JSON and YAML can hold half of a surrogate pair (\ud800), UTF-8 cannot.
HALF_PAIR = re.compile("[\\ud800-\\udfff]")


class UnreadableTextError(ValueError):
    """What is at a path is no text file of a permitted size."""


def read_text(path: Path, follow: bool = False, largest: int = LARGEST_TEXT) -> str:
    """Read a text file in UTF-8.

    Args:
        path: A regular file. A pipe or device is refused, and opening it does not block.
        follow: Whether the file may be a symbolic link, as in the cache of the Hugging Face hub.
        largest: The largest size that is accepted, in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or, as UnreadableTextError, not a regular file or too large.
    """
    if not follow and path.is_symlink():
        raise UnreadableTextError("it is a link")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableTextError("it is not a regular file")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    with open(handle, "rb") as file:
        # The file may have been replaced since the first check.
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnreadableTextError("it is not a regular file")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UnreadableTextError(f"it is larger than {largest:,} bytes")
    return content.decode("utf-8")


def read_json(path: Path, follow: bool = False) -> dict[str, Any]:
    """Read the object in a JSON file. Arguments and errors are those of `read_text` and `parse_json`."""
    return parse_json(read_text(path, follow))


def parse_json(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: The text is not valid JSON or not an object, gives a key twice, nests too deeply, or has a number
            that is not finite or has too many digits.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_short
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def printable(text: str) -> str:
    """Escape the characters of a text that a terminal would not print as they are: a name may hold any bytes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object (`object_pairs_hook` of json.loads). Raises ValueError if a key is given twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it gives the key {twice[:80]!a} twice")
    return values


def _refuse_constant(word: str) -> NoReturn:
    # Python accepts NaN and Infinity, which are not JSON.
    raise ValueError(f"{word} is not a JSON number")


def _short(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS} characters")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:80]} is too large for a number")
    return number
