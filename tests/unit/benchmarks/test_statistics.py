"""Tests of medians, spreads and ratios."""

import pytest

from benchmarks.statistics import Spread, speed_ratio, spread


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread(4.0, 3.0, 5.0).relative == 0.25
    with pytest.raises(ValueError, match="measure at least one round"):
        spread([])


def test_a_ratio_is_that_of_each_round_and_not_of_the_medians() -> None:
    # The machine becomes slower from round to round; within each round the first program is twice as fast.
    assert speed_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == Spread(2.0, 2.0, 2.0)
    assert speed_ratio([1.0, 1.0, 4.0], [1.0, 4.0, 4.0]) == Spread(1.0, 1.0, 2.5)
    with pytest.raises(ValueError):
        speed_ratio([1.0], [1.0, 2.0])
