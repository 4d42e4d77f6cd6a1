"""Tests of the verdicts on claims."""

import pytest

from dist_moe.study.grid.claims import (
    Claim,
    Measure,
    below,
    claim_lines,
    difference_below,
    equal_within,
    equal_within_cases,
    lower_by_factor,
)
from dist_moe.study.grid.statistics import Results
from tests.unit.study.grid.results import result, two_arms

LOSS = Measure("loss", 2, " nats")
SEEDS = ((0, 0.01), (1, -0.01), (2, 0.02))


@pytest.mark.parametrize(
    ("first", "verdict"),
    [([0.9, 0.91, 0.89], "holds"), ([1.1, 1.11, 1.09], "does not hold"), ([0.9, 1.05, 0.98], "not resolved")],
)
def test_trap_T92_a_difference_is_resolved_where_its_interval_is_on_one_side(first: list[float], verdict: str) -> None:
    claim = difference_below(two_arms(first, [1.0, 1.0, 1.0]), "a is lower", "a", "b", LOSS, limit=0.0)
    assert claim.verdict == verdict
    assert claim.evidence.endswith(f"by seed {first[0] - 1:+.2f}, {first[1] - 1:+.2f}, {first[2] - 1:+.2f})")


def test_one_seed_resolves_nothing() -> None:
    claim = difference_below(two_arms([0.1], [1.0]), "a is lower", "a", "b", LOSS, limit=0.0)
    assert claim == Claim("a is lower", "not resolved", "-0.90 nats with one seed")


@pytest.mark.parametrize(
    ("first", "verdict"),
    [([1.01, 0.99, 1.0], "holds"), ([1.5, 1.51, 1.49], "does not hold"), ([1.0, 1.2, 0.8], "not resolved")],
)
def test_equality_needs_the_whole_interval_within_the_margin(first: list[float], verdict: str) -> None:
    results = two_arms(first, [1.0, 1.0, 1.0])
    assert equal_within(results, "equal", "a", "b", LOSS, margin=0.1).verdict == verdict


@pytest.mark.parametrize(
    ("first", "verdict"), [([1.0, 0.9], "holds"), ([1.0], "not resolved"), ([2.0, 1.0], "does not hold")]
)
def test_trap_T92_a_factor_must_hold_for_each_seed(first: list[float], verdict: str) -> None:
    claim = lower_by_factor(two_arms(first, [10.0, 10.0]), "ten times", "", "a", "b", LOSS, factor=10)
    assert claim.verdict == verdict
    if verdict == "holds":
        assert claim.evidence == "factors 10.0, 11.1 by seed (from 10 to 1 nats, 10 to 0.9 nats)"


def test_a_limit_must_hold_in_every_case() -> None:
    results = Results([result("a", 0, "x", share=0.018), result("a", 0, "y", share=0.021)])
    percent = Measure("share", 1, " %", factor=100)
    assert below(results, "below 2 %", "a", percent, 2.0).verdict == "does not hold"
    assert below(results, "below 3 %", "a", percent, 3.0) == Claim("below 3 %", "holds", "1.8 to 2.1 % in 2 runs")
    assert below(results, "below 1 %", "a", percent, 1.0).verdict == "does not hold"


def test_missing_arms_are_not_measured_and_what_does_not_hold_comes_first() -> None:
    results = two_arms([1.0], [1.0])
    missing = [
        difference_below(results, "1", "a", "c", LOSS, limit=0.0),
        equal_within(results, "2", "a", "c", LOSS, margin=1.0),
        lower_by_factor(results, "3", "", "a", "c", LOSS, factor=2),
        below(results, "4", "c", LOSS, limit=0.0),
    ]
    assert [claim.verdict for claim in missing] == ["not measured"] * 4
    lines = claim_lines([Claim("good", "holds", "1"), missing[0], Claim("bad", "does not hold", "2")])
    assert [line for line in lines if line] == [
        *("**Does not hold**", "- bad: 2.", "**Not measured**", "- 1: no seed has finite results of both arms."),
        *("**Holds**", "- good: 1."),
    ]


def test_arms_are_equal_within_a_margin_over_fixed_cases() -> None:
    """The cases differ by more than the margin, and the seeds within a case do not."""
    found = [
        result("a", seed, case, loss=base + step) for case, base in (("x", 1.0), ("y", 5.0)) for seed, step in SEEDS
    ]
    found += [result("b", seed, case, loss=base) for case, base in (("x", 1.0), ("y", 5.0)) for seed, _ in SEEDS]
    equal = equal_within_cases(Results(found), "equal", "a", "b", Measure("loss", 2), margin=0.1)
    assert equal.verdict == "holds" and "x +0.01, -0.01, +0.02; y +0.01, -0.01, +0.02" in equal.evidence
    assert (
        equal_within_cases(Results(found), "equal", "a", "b", Measure("loss", 2), margin=0.001).verdict
        == "not resolved"
    )
    assert equal_within_cases(Results([]), "equal", "a", "b", Measure("loss", 2), margin=1.0).verdict == "not measured"
