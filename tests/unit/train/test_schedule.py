"""The learning rate: warm-up, cosine, and what comes after."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.train.schedule import Schedule


def test_the_warm_up_is_a_straight_line_that_starts_above_zero() -> None:
    schedule = Schedule(peak=0.8, warmup_steps=4, steps=100, final_ratio=0.1)
    assert [schedule.learning_rate(taken) for taken in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_the_cosine_ends_at_its_part_of_the_peak_and_stays() -> None:
    schedule = Schedule(peak=2.0, warmup_steps=10, steps=110, final_ratio=0.25)
    assert schedule.learning_rate(10) == 2.0
    assert schedule.learning_rate(60) == pytest.approx(2.0 * 0.625), "half-way between 1 and 0.25"
    assert schedule.learning_rate(35) == pytest.approx(2.0 * (0.25 + 0.75 * (1 + math.sqrt(0.5)) / 2))
    assert [schedule.learning_rate(taken) for taken in (110, 111, 10**6)] == pytest.approx([0.5] * 3)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert Schedule(0.3, 0, 10, 0.0).learning_rate(0) == 0.3


@given(st.floats(1e-6, 1.0), st.integers(0, 20), st.integers(0, 50), st.floats(0.0, 1.0))
def test_it_rises_to_the_peak_and_falls_to_the_end(peak: float, warmup: int, more: int, ratio: float) -> None:
    schedule = Schedule(peak, warmup, warmup + more, ratio)
    rates = [schedule.learning_rate(taken) for taken in range(warmup + more + 3)]
    assert all(0.0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    falling = rates[warmup:]
    assert all(later <= earlier + 1e-12 * peak for earlier, later in itertools.pairwise(falling))
    assert falling[-1] == pytest.approx(peak * ratio)
