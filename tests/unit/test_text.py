"""Tests of the formatting of values for messages."""

import pytest

from dist_moe.text import counted, format_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1500, "1.5 kB"), (2_500_000.4, "2.5 MB"), (4e12, "4.0 TB")],
)
def test_format_bytes_uses_decimal_units(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 workers"), (1, "1 worker"), (1024, "1,024 workers")])
def test_counted_agrees_in_number(count: int, text: str) -> None:
    assert counted(count, "worker") == text
