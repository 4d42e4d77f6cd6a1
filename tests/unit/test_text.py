"""Formatting of values, lists and sizes for messages."""

import pytest

from dist_moe.text import counted, divisors, format_bytes, listed, nearest, shown, up_to


def test_values_are_one_short_line() -> None:
    assert [shown(value) for value in (3, True, None, "", "a\nb", [1], 1e-6)] == [
        *("3", "true", "null", '""', "a b", "[1]", "1e-06")
    ]
    assert shown("a" + "x" * 300 + "b") == "a" + "x" * 97 + "..." + "x" * 97 + "b"


def test_lists_are_joined_and_cut() -> None:
    assert [listed(range(count)) for count in range(4)] == ["", "0", "0 or 1", "0, 1 or 2"]
    assert listed("abc", last="and", most=3) == "a, b and c"
    assert listed("abcde", last="and", most=3) == "a, b, c and 2 more"
    assert listed("ab", most=1) == "a and 1 more"


def test_divisors_ascend() -> None:
    assert [divisors(number) for number in (1, 7, 12)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12]]
    for number in range(1, 200):
        assert divisors(number) == [count for count in range(1, number + 1) if number % count == 0]
    assert len(divisors(10**12)) == 169


def test_the_nearest_word_is_close_or_none() -> None:
    assert nearest("stepps", ["step", "steps"]) == "steps"
    assert nearest("qqq", ["step"]) is None


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1500, "1.5 kB"), (2_500_000.4, "2.5 MB"), (4e12, "4.0 TB")],
)
def test_format_bytes_uses_decimal_units(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 workers"), (1, "1 worker"), (1024, "1,024 workers")])
def test_counted_agrees_in_number(count: int, text: str) -> None:
    assert counted(count, "worker") == text


@pytest.mark.parametrize(("last", "first", "text"), [(4, 1, "1 to 4"), (1, 1, "1"), (3, 0, "0 to 3"), (0, 0, "0")])
def test_a_range_of_one_number_is_that_number(last: int, first: int, text: str) -> None:
    assert up_to(last, first) == text
