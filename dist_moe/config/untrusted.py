"""Reads text and JSON that strangers may have written: of bounded size, without waiting, without silent choices."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

LARGEST_TEXT = 1 << 26


def read_text(path: Path, follow: bool = False, largest: int = LARGEST_TEXT) -> str:
    """A text file in UTF-8, of at most `largest` bytes.

    follow: whether it may be a link, as in the cache of the Hugging Face hub. Errors: OSError, and ValueError for
    whatever is no such file: opening it does not wait, as that of a pipe would.
    """
    if not follow and path.is_symlink():
        raise ValueError("it is a link")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no file")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest} bytes")
    return content.decode("utf-8")


def read_json(path: Path, follow: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Errors: as `read_text` and `parse_json`."""
    return parse_json(read_text(path, follow))


def parse_json(text: str) -> dict[str, Any]:
    """The object in a text. Errors: ValueError, also for a key given twice, and for a number that is none."""
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def printable(text: str) -> str:
    """The text with escapes for what would not be shown as it is: a name may be of any bytes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it gives the key {twice[:80]!a} twice")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:80]} is too large for a number")
    return number
