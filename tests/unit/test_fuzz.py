"""The short form of `python -m tests.fuzz`, and that it finds what it looks for."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.fuzz import surface as limits
from tests.fuzz.surface import Surface, silence, try_surface
from tests.fuzz.surfaces import all_surfaces

# The checkpoint is that of a run.
SURFACES = [
    pytest.param(surface, marks=[pytest.mark.slow] if surface.name == "checkpoint" else [], id=surface.name)
    for surface in all_surfaces()
]


@pytest.mark.parametrize("surface", SURFACES)
def test_valid_input_is_accepted(surface: Surface, tmp_path: Path) -> None:
    for value in surface.valid:
        with silence():
            surface.read(value, tmp_path)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.slow
def test_damaged_input_is_refused_with_a_message(surface: Surface, tmp_path: Path) -> None:
    result = try_surface(surface, 40, 1, tmp_path)
    assert result.failure == ""
    # A launch closes the connection, and a report says what could not be read.
    assert result.refused or surface.name in ("launch", "report")


def raise_type_error(value: Any, folder: Path) -> None:
    """Fail as code does that does not expect a value."""
    if value > 500:
        raise TypeError("unexpected")


def refuse_silently(value: Any, folder: Path) -> None:
    """Refuse without a word."""
    raise ValueError


def hang(value: Any, folder: Path) -> None:
    """Never return."""
    while True:
        time.sleep(0.01)


def fill_memory(value: Any, folder: Path) -> int:
    """Take more memory than an input may."""
    return len(bytes(2 * limits.HEADROOM_BYTES))


KEPT: list[bytes] = []


def grow(value: Any, folder: Path) -> None:
    """Keep memory after each input."""
    KEPT.append(b"x" * (limits.MAX_GROWTH_BYTES // 4))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (raise_type_error, "input 501"),
        (refuse_silently, "a refusal without a message"),
        (hang, "HangError"),
        (fill_memory, "MemoryError"),
        (grow, "the process has grown by"),
    ],
)
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Any, message: str) -> None:
    monkeypatch.setattr(limits, "LIMIT_S", 3.0)
    surface = Surface("faulty", st.integers(0, 1 << 20), read, [], (ValueError,))
    try:
        result = try_surface(surface, 20, 0, tmp_path)
    finally:
        KEPT.clear()
    assert message in result.failure
