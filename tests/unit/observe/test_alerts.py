"""Tests of the load alerts: each warning appears once, and again only after the problem was gone."""

import pytest

from dist_moe.observe.alerts import LoadAlerts
from tests.unit.observe.samples import step_sample

EVEN = [100, 100, 100, 100]
UNEVEN = [370, 10, 10, 10]  # MaxVio 2.7
DEAD = [200, 0, 100, 100]  # MaxVio 1.0


def test_a_dead_expert_is_reported_once_until_it_receives_tokens() -> None:
    alerts = LoadAlerts(limit=5.0, patience=3)
    first = alerts.check(step_sample(step=10, loads=(EVEN, DEAD)))
    assert first == ["step 10: layer 1: no tokens for expert 1 (mean load 100)"]
    assert alerts.check(step_sample(step=20, loads=(EVEN, DEAD))) == []
    assert alerts.check(step_sample(step=30, loads=(EVEN, [400, 0, 0, 0]))) == [
        "step 30: layer 1: no tokens for experts 2, 3 (mean load 100)"
    ]
    assert alerts.check(step_sample(step=40, loads=(EVEN, EVEN))) == []
    assert len(alerts.check(step_sample(step=50, loads=(EVEN, DEAD)))) == 1


def test_an_empty_expert_is_not_reported_where_few_tokens_are_expected() -> None:
    alerts = LoadAlerts(limit=5.0, patience=1)
    assert alerts.check(step_sample(loads=([20, 0, 10], [0, 0, 0]))) == [
        "step 10: layer 0: no tokens for expert 1 (mean load 10)"
    ]
    assert LoadAlerts(limit=5.0, patience=1).check(step_sample(loads=([20, 0, 9],))) == []


def test_max_vio_above_the_limit_is_reported_after_patience_consecutive_steps() -> None:
    alerts = LoadAlerts(limit=1.0, patience=3)
    warnings = [alerts.check(step_sample(step=step, loads=(EVEN, UNEVEN))) for step in (10, 20, 30, 40, 50, 60, 70)]
    assert [len(lines) for lines in warnings] == [0, 0, 1, 0, 0, 0, 0]
    (line,) = warnings[2]
    assert line.startswith("step 30: layer 1: MaxVio 2.70 (floor 0.10) is above 1 in 3 consecutive logged steps; ")


def test_one_even_step_resets_the_count() -> None:
    alerts = LoadAlerts(limit=1.0, patience=2)
    loads = [UNEVEN, EVEN, UNEVEN, EVEN, UNEVEN, UNEVEN]
    warnings = [alerts.check(step_sample(step=step, loads=(load,))) for step, load in enumerate(loads)]
    assert [len(lines) for lines in warnings] == [0, 0, 0, 0, 0, 1]


def test_the_limit_itself_is_not_above_the_limit() -> None:
    alerts = LoadAlerts(limit=1.0, patience=1)
    assert alerts.check(step_sample(loads=([200, 100, 50, 50],))) == []


def test_a_floor_above_the_limit_replaces_it() -> None:
    # Four assignments to four experts: MaxVio 1 is below the floor of 1.03.
    assert LoadAlerts(limit=0.5, patience=1).check(step_sample(loads=([2, 1, 1, 0],))) == []
    assert len(LoadAlerts(limit=0.5, patience=1).check(step_sample(loads=([3, 1, 0, 0],)))) == 1


def test_skipped_steps_neither_count_nor_reset_the_count() -> None:
    alerts = LoadAlerts(limit=1.0, patience=2)
    assert alerts.check(step_sample(step=1, loads=(UNEVEN,))) == []
    assert alerts.check(step_sample(step=2, loads=(EVEN,), skipped=True)) == []
    assert len(alerts.check(step_sample(step=3, loads=(UNEVEN,)))) == 1
    assert alerts.check(step_sample(step=4, loads=(DEAD,), skipped=True)) == []


def test_a_model_without_moe_layers_gives_no_warning() -> None:
    assert LoadAlerts(limit=0.0, patience=1).check(step_sample(loads=())) == []


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="patience=0; it is a number of logged steps"):
        LoadAlerts(limit=1.0, patience=0)
