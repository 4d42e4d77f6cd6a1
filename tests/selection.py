"""Which parameters of a test `make test` runs: a few in which all values occur; `make test-all` runs all of them."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

Place = tuple[int, int]  # (axis, index of its value)


def cross(*axes: tuple[str, Sequence[Any]], strength: int = 2) -> pytest.MarkDecorator:
    """Parametrize a test with the full cross of the axes; what is beyond a covering subset is marked `full`.

    Args:
        axes: Names as for `pytest.mark.parametrize` (one, or several with commas) and their values.
        strength: In the subset every combination of the values of this many axes occurs that can; 1 for every value.
    """
    combinations = list(itertools.product(*(range(len(values)) for _, values in axes)))
    chosen = set(covering(combinations, strength))
    cases = []
    for combination in combinations:
        flat: list[Any] = []
        for (names, values), index in zip(axes, combination, strict=True):
            flat.extend(values[index] if "," in names else [values[index]])
        cases.append(pytest.param(*flat) if combination in chosen else full(*flat))
    return pytest.mark.parametrize(", ".join(names for names, _ in axes), cases)


def only_first(values: Sequence[Any], count: int = 1) -> list[Any]:
    """The values for `pytest.mark.parametrize`; those after the first `count` are marked `full`."""
    return [value if place < count else full(value) for place, value in enumerate(values)]


def full(*values: Any) -> Any:
    """One set of values for `pytest.mark.parametrize`, marked `full`."""
    return pytest.param(*values, marks=pytest.mark.full)


def slow(*values: Any) -> Any:
    """One set of values for `pytest.mark.parametrize`, marked `slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def covering(combinations: Sequence[tuple[int, ...]], strength: int) -> list[tuple[int, ...]]:
    """Few of the combinations, in which every choice of `strength` places occurs that occurs in all of them.

    Greedy and without chance: each time the first of the combinations that bring the most.
    """
    missing = set[frozenset[Place]]().union(*(_choices(one, strength) for one in combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda one: len(_choices(one, strength) & missing))
        missing -= _choices(best, strength)
        chosen.append(best)
    return chosen


def _choices(combination: tuple[int, ...], strength: int) -> set[frozenset[Place]]:
    size = min(strength, len(combination))
    return {frozenset(chosen) for chosen in itertools.combinations(enumerate(combination), size)}
