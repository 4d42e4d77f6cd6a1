"""Which parameters are marked `full`: never one that alone has a value, or a pair of values, and many others."""

import itertools
from typing import Any

import pytest

from tests.selection import covering, cross, only_first


def split(mark: pytest.MarkDecorator) -> tuple[list[Any], list[Any]]:
    """The values of a parametrized test without and with the mark `full`."""
    names = [[found.name for found in case.marks] for case in mark.args[1]]
    values = [case.values for case in mark.args[1]]
    return tuple(  # type: ignore[return-value]
        [one for one, found in zip(values, names, strict=True) if found == marks] for marks in ([], ["full"])
    )


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_so_many_values_occurs_in_few(strength: int) -> None:
    everything = list(itertools.product(range(4), range(3), range(2), range(2)))
    chosen = covering(everything, strength)
    for axes in itertools.combinations(range(4), strength):
        assert {tuple(one[axis] for axis in axes) for one in chosen} == {
            tuple(one[axis] for axis in axes) for one in everything
        }
    assert len(chosen) <= {1: 4, 2: 13, 3: 28}[strength] < len(everything)
    assert covering(everything, strength) == chosen


def test_a_cross_holds_all_and_marks_what_is_beyond_the_subset() -> None:
    mark = cross(("stage", [0, 1, 2]), ("workers, parallel", [(1, 1), (2, 2)]), strength=1)
    assert mark.args[0] == "stage, workers, parallel"
    few, further = split(mark)
    assert sorted(few + further) == [(stage, w, w) for stage in range(3) for w in (1, 2)]
    assert {one[0] for one in few} == {0, 1, 2} and {one[1:] for one in few} == {(1, 1), (2, 2)} and len(few) == 3


def test_two_axes_at_strength_two_are_all_needed() -> None:
    few, further = split(cross(("a", [0, 1]), ("b", [0, 1, 2])))
    assert len(few) == 6 and further == []


def test_only_the_first_are_left_unmarked() -> None:
    first, *others = only_first(["a", "b", "c"])
    assert first == "a" and [(one.values, one.marks[0].name) for one in others] == [(("b",), "full"), (("c",), "full")]
