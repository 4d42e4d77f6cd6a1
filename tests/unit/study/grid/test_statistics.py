"""Tests of the intervals and of the pairing by seed, with values that were computed by hand."""

import math

import pytest

from dist_moe.study.grid.statistics import (
    Results,
    compare_examples,
    interval,
    interval_within_groups,
    proportion_interval,
)
from tests.unit.study.grid.results import result, two_arms


def test_trap_T92_the_interval_is_that_of_students_t() -> None:
    found = interval([1.0, 2.0, 3.0])
    # t(0.975, 2 degrees of freedom) = 4.302653; times 1 / sqrt(3).
    assert found.mean == 2.0 and found.half_width == pytest.approx(2.484138, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((-0.484138, 4.484138), abs=1e-5)
    assert found.text(2) == "+2.00 ± 2.48"


def test_a_single_value_has_no_interval_and_no_value_is_an_error() -> None:
    found = interval([1.5])
    assert (found.half_width, found.low, found.high) == (None, -math.inf, math.inf) and found.text(1) == "+1.5"
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_the_interval_of_a_proportion_is_wilsons() -> None:
    # 80 of 100: Wilson's interval is 0.7112 to 0.8666.
    assert proportion_interval(0.8, 100) == pytest.approx((0.71117, 0.86663), abs=1e-4)
    assert proportion_interval(1.0, 50)[1] <= 1.0 + 1e-12


def test_trap_T92_differences_are_paired_by_seed_and_averaged_over_cases() -> None:
    results = Results(
        [
            *(result("a", 0, "x", loss=1.0), result("a", 0, "y", loss=3.0), result("a", 1, "x", loss=5.0)),
            *(result("b", 0, "x", loss=0.5), result("b", 0, "y", loss=1.5), result("b", 2, "x", loss=9.0)),
        ]
    )
    assert results.pairs("x", "a", "b", "loss") == {0: (1.0, 0.5)}
    assert results.differences("a", "b", "loss") == [1.0], "the mean of 0.5 and 1.5; seed 1 has no partner"
    assert results.differences("a", "b", "loss", ["y"]) == [1.5]
    more = Results([*results.all, result("a", 2, "x", loss=10.0)])
    assert more.differences("a", "b", "loss") == [1.0], "seed 2 has one of the two cases"
    assert more.differences("a", "b", "loss", ["x"]) == [0.5, 1.0]
    assert results.ratios("x", "a", "b", "loss") == {0: 2.0}
    assert (results.cases, results.arms) == (["x", "y"], ["a", "b"])


def test_values_that_are_not_finite_are_left_out() -> None:
    results = Results([result("a", 0, loss=None), result("a", 1, loss=2.0), result("b", 0, loss=1.0)])
    assert results.values("", "a", "loss") == [2.0] and results.pairs("", "a", "b", "loss") == {}
    assert two_arms([1.0], [0.0]).ratios("", "a", "b", "loss") == {}, "no division by 0"


def test_the_variance_within_fixed_groups_is_pooled() -> None:
    found = interval_within_groups([[1.0, 3.0], [10.0, 14.0], []])
    # Squares within groups 2 + 8 over 2 degrees of freedom: 5; the mean of two means has the variance (5/2 + 5/2) / 4.
    assert found.mean == 7.0 and found.half_width == pytest.approx(4.302653 * math.sqrt(5 / 4), rel=1e-6)
    assert interval_within_groups([[1.0], [3.0]]).half_width is None
    with pytest.raises(ValueError, match="at least one"):
        interval_within_groups([[], []])


def test_runs_are_compared_by_example() -> None:
    # 10 examples: 0b1111_1100_00 against 0b1010_1111_00, padded to 12 bits.
    found = compare_examples("fc0", "af0", 10)
    assert (found.only_first, found.only_second) == (2, 2)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.half_width == pytest.approx(1.959964 * math.sqrt(0.4 / 10), abs=1e-6)
    found = compare_examples("fff", "003", 12)
    # Ten against none: 2 / 2**10.
    assert found.p_value == pytest.approx(2 / 1024) and found.difference == pytest.approx(10 / 12)
    assert compare_examples("fff", "fff", 12).p_value == 1.0
    for first, second, count in (("fff", "ff", 8), ("f", "f", 5), ("", "", 0)):
        with pytest.raises(ValueError, match="the same examples"):
            compare_examples(first, second, count)
