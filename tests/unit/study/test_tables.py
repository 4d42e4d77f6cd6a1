"""Tests of the tables that the studies share."""

import pytest
from rich.console import Console

from dist_moe.study.tables import format_mean, markdown_table, terminal_table


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        ([1, 3], 0, "2 ±1"),
        ([5, None, 5], 0, "5 (2 of 3)"),
        ([None, 4], 0, "4 (1 of 2)"),
        ([7], 0, "7"),
        ([None], 0, "never"),
        ([4.0, 4.002], 4, "4.0010 ±0.0014"),
        ([2.0, 2.0], 2, "2.00"),
        ([1.0, 1.001], 2, "1.00"),
        ([1234.5], 0, "1,234"),
    ],
)
def test_format_mean(values: list[float | None], digits: int, text: str) -> None:
    assert format_mean(values, digits) == text


def test_markdown_table() -> None:
    assert markdown_table(("policy", "loss"), [["none", "4.2"]]) == [
        "| policy | loss |",
        "|---|---:|",
        "| none | 4.2 |",
    ]


def test_a_narrow_terminal_table_breaks_no_number() -> None:
    with (console := Console(width=30, color_system=None)).capture() as output:
        console.print(terminal_table("title", ("policy", "one", "two"), [["none", "1.234 ±0.001", "12,345 ±6,789"]]))
    for number in ("1.234", "±0.001", "12,345", "±6,789"):
        assert number in output.get()
