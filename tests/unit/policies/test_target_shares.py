"""Tests of target shares: those of all experts, of damaged files, and the extreme loads relative to them."""

import math
from typing import Any

import pytest

from dist_moe.policies.shares import equal_shares, extreme_loads, shares_in_file, shares_of_all


def test_experts_without_a_share_have_equal_parts_of_the_rest() -> None:
    assert shares_of_all({"1": 0.4}, 4) == pytest.approx((0.2, 0.4, 0.2, 0.2))
    assert shares_of_all([0.5, 0.25, 0.25], 3) == (0.5, 0.25, 0.25)
    assert equal_shares(3) is None


@pytest.mark.parametrize(
    "given",
    [
        *(None, "0.5", 1, {}, [], [[0.5], [0.5]], [0.5], [0.5, 0.25, 0.25], [0.5, 0.6], [1.5, -0.5], [True, 0.5]),
        *({"0": 1.0}, {"0": "1"}, {"7": 0.5, "8": 0.5}, [math.nan, 0.5], {"0": 0.3, "1": 0.3, "2": 0.4}, {0: 0.5}),
    ],
)
def test_shares_of_a_damaged_file_are_none(given: Any) -> None:
    shares = shares_in_file(given, 2)
    assert shares is None or ((given == {} or 0 in given) and sum(shares) == pytest.approx(1))


def test_shares_of_a_file_are_those_of_its_run() -> None:
    assert shares_in_file({"0": 0.5}, 3) == (0.5, 0.25, 0.25)
    assert shares_in_file([0.75, 0.25], 2) == (0.75, 0.25)


def test_extreme_loads_are_relative_to_the_targets() -> None:
    assert extreme_loads([10, 20, 30]) == [(0, 0.5), (2, 1.5)]
    assert extreme_loads([10, 20, 30], (0.1, 0.4, 0.5)) == [(1, pytest.approx(20 / 24)), (0, pytest.approx(10 / 6))]
    assert all(expert == 0 and math.isnan(ratio) for expert, ratio in extreme_loads([0, 0]))
