"""Warnings about the load: each is said once, when it is true, and again only after it was not."""

import pytest

from dist_moe.observe.alerts import LoadWatch
from tests.unit.observe.samples import step_sample

EVEN = [100, 100, 100, 100]
UNEVEN = [370, 10, 10, 10]  # MaxVio 2.7
DEAD = [200, 0, 100, 100]  # MaxVio 1.0


def test_a_dead_expert_is_named_once_until_it_comes_back() -> None:
    watch = LoadWatch(limit=5.0, patience=3)
    first = watch.step(step_sample(step=10, loads=(EVEN, DEAD)))
    assert first == ["step 10: layer 1: no token for expert 1 (the mean is 100)"]
    assert watch.step(step_sample(step=20, loads=(EVEN, DEAD))) == []
    assert watch.step(step_sample(step=30, loads=(EVEN, [400, 0, 0, 0]))) == [
        "step 30: layer 1: no token for experts 2, 3 (the mean is 100)"
    ]
    assert watch.step(step_sample(step=40, loads=(EVEN, EVEN))) == []
    assert len(watch.step(step_sample(step=50, loads=(EVEN, DEAD)))) == 1


def test_an_empty_expert_says_nothing_where_few_tokens_were_expected() -> None:
    watch = LoadWatch(limit=5.0, patience=1)
    assert watch.step(step_sample(loads=([20, 0, 10], [0, 0, 0]))) == [
        "step 10: layer 0: no token for expert 1 (the mean is 10)"
    ]
    assert LoadWatch(limit=5.0, patience=1).step(step_sample(loads=([20, 0, 9],))) == []


def test_max_vio_over_the_limit_is_said_after_patience_steps_in_a_row() -> None:
    watch = LoadWatch(limit=1.0, patience=3)
    said = [watch.step(step_sample(step=step, loads=(EVEN, UNEVEN))) for step in (10, 20, 30, 40, 50, 60, 70)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0, 0]
    (line,) = said[2]
    assert line.startswith("step 30: layer 1: MaxVio 2.70 (floor 0.10) is above 1 for 3 logged steps in a row; ")


def test_one_even_step_starts_the_count_again() -> None:
    watch = LoadWatch(limit=1.0, patience=2)
    loads = [UNEVEN, EVEN, UNEVEN, EVEN, UNEVEN, UNEVEN]
    said = [watch.step(step_sample(step=step, loads=(load,))) for step, load in enumerate(loads)]
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 0, 1]


def test_the_limit_itself_is_not_above_the_limit() -> None:
    watch = LoadWatch(limit=1.0, patience=1)
    assert watch.step(step_sample(loads=([200, 100, 50, 50],))) == []


def test_where_chance_gives_more_than_the_limit_the_floor_is_the_limit() -> None:
    # Four assignments to four experts: MaxVio 1 is below the floor of 1.03.
    assert LoadWatch(limit=0.5, patience=1).step(step_sample(loads=([2, 1, 1, 0],))) == []
    assert len(LoadWatch(limit=0.5, patience=1).step(step_sample(loads=([3, 1, 0, 0],)))) == 1


def test_skipped_steps_neither_count_nor_break_the_row() -> None:
    watch = LoadWatch(limit=1.0, patience=2)
    assert watch.step(step_sample(step=1, loads=(UNEVEN,))) == []
    assert watch.step(step_sample(step=2, loads=(EVEN,), skipped=True)) == []
    assert len(watch.step(step_sample(step=3, loads=(UNEVEN,)))) == 1
    assert watch.step(step_sample(step=4, loads=(DEAD,), skipped=True)) == []


def test_a_model_without_moe_layers_gives_no_warning() -> None:
    assert LoadWatch(limit=0.0, patience=1).step(step_sample(loads=())) == []


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="patience=0; it counts logged steps"):
        LoadWatch(limit=1.0, patience=0)
