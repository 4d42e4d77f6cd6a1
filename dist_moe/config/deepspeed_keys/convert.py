"""Converts values of DeepSpeed's keys to values of the fields here with the same meaning."""

from collections.abc import Callable, Mapping
from typing import Any

from dist_moe.text import listed


def number(value: Any) -> Any:
    """Return a number as it is.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("is not a number")
    return value


def whole(value: Any) -> int:
    """Return a whole number of 0 or more, such as 8 or 8.0, as an integer.

    Raises:
        ValueError: It is none.
    """
    if number(value) % 1 or value < 0:
        raise ValueError("is not a whole number of 0 or more")
    return int(value)


def numbers(value: Any) -> list[Any]:
    """Return a list of two numbers as it is.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("is not a list of two numbers")
    return [number(one) for one in value]


def choice(values: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """Return a function that maps a value, in lower case if it is a text.

    Args:
        values: Value of DeepSpeed -> value of the field.
    """

    def convert(value: Any) -> Any:
        wanted = value.lower() if isinstance(value, str) else value
        for known, field in values.items():
            if type(known) is type(wanted) and known == wanted:
                return field
        raise ValueError(f"has no counterpart here (only {listed(map(_shown, values))} has one)")

    return convert


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
