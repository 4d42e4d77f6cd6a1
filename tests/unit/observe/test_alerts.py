"""Tests of the load alerts: a problem that lasts is reported once, with what to do; a short or early one is not."""

import pytest

from dist_moe.observe.alerts import CHOOSE_ANOTHER, EARLY_STEPS, LoadAlerts
from tests.unit.observe.samples import step_sample

REMEDY = f"raise balance.rate, or {CHOOSE_ANOTHER}"
EVEN = [100, 100, 100, 100]
UNEVEN = [370, 10, 10, 10]  # MaxVio 2.7
DEAD = [200, 0, 100, 100]  # MaxVio 1.0


def alerts_of(limit: float, patience: int) -> LoadAlerts:
    return LoadAlerts(limit, patience, early_steps=0)


def test_a_dead_expert_is_reported_once_when_it_lasts() -> None:
    alerts = alerts_of(limit=5.0, patience=3)
    warnings = [alerts.check(step_sample(step=step, loads=(EVEN, DEAD))) for step in (10, 20, 30, 40, 50)]
    assert warnings == [[], [], [f"no tokens for expert 1 of layer 1 from step 10 to 30; {REMEDY}"], [], []]
    assert alerts.check(step_sample(step=60, loads=(EVEN, EVEN))) == []
    for step in (70, 80, 90):
        assert alerts.check(step_sample(step=step, loads=(EVEN, DEAD))) == [], "one warning for each expert"


def test_dead_experts_of_one_step_are_one_line() -> None:
    alerts = alerts_of(limit=5.0, patience=1)
    assert alerts.check(step_sample(step=7, loads=([400, 0, 0, 0], DEAD))) == [
        f"no tokens for expert 1 of layer 0, 2 of layer 0, 3 of layer 0 and 1 of layer 1 in step 7; {REMEDY}"
    ]


def test_an_empty_expert_is_not_reported_where_few_tokens_are_expected() -> None:
    assert alerts_of(limit=5.0, patience=1).check(step_sample(loads=([20, 0, 9], [0, 0, 0]))) == []
    assert len(alerts_of(limit=5.0, patience=1).check(step_sample(loads=([20, 0, 10],)))) == 1


def test_without_a_rate_none_is_to_be_raised() -> None:
    alerts = LoadAlerts(5.0, 1, early_steps=0, has_rate=False)
    (warning,) = alerts.check(step_sample(step=7, loads=(EVEN, DEAD)))
    assert warning.endswith(f"in step 7; {CHOOSE_ANOTHER}")


def test_an_expert_with_a_small_target_may_be_empty() -> None:
    shares = (0.5, 0.001, 0.25, 0.249)
    alerts = LoadAlerts(5.0, 1, early_steps=0, target_shares=lambda _: shares)
    assert alerts.check(step_sample(step=7, loads=(EVEN, DEAD))) == []
    others = LoadAlerts(5.0, 1, early_steps=0, target_shares=lambda _: (0.4, 0.1, 0.25, 0.25))
    assert others.check(step_sample(step=7, loads=(EVEN, DEAD))) != []


def test_max_vio_above_the_limit_is_reported_after_patience_consecutive_steps() -> None:
    alerts = alerts_of(limit=1.0, patience=3)
    warnings = [alerts.check(step_sample(step=step, loads=(EVEN, UNEVEN))) for step in (10, 20, 30, 40, 50, 60, 70)]
    assert [len(lines) for lines in warnings] == [0, 0, 1, 0, 0, 0, 0]
    assert warnings[2] == [
        "load of layer 1 is uneven from step 10 to 30 (3 logged steps): MaxVio 2.70 in layer 1 (floor 0.10), above 1; "
        f"{REMEDY}"
    ]


def test_all_layers_of_a_model_are_one_line() -> None:
    (line,) = alerts_of(limit=1.0, patience=1).check(step_sample(step=3, loads=(UNEVEN,) * 60))
    assert line.startswith("load of layers 0, 1, 2, 3, 4, 5, 6, 7 and 52 more is uneven in step 3 (1 logged step): ")


def test_one_even_step_resets_the_count() -> None:
    alerts = alerts_of(limit=1.0, patience=2)
    loads = [UNEVEN, EVEN, UNEVEN, EVEN, UNEVEN, UNEVEN]
    warnings = [alerts.check(step_sample(step=step, loads=(load,))) for step, load in enumerate(loads, start=1)]
    assert [len(lines) for lines in warnings] == [0, 0, 0, 0, 0, 1]


def test_the_first_steps_do_not_count() -> None:
    alerts = LoadAlerts(limit=1.0, patience=2)
    steps = (1, EARLY_STEPS, EARLY_STEPS + 1, EARLY_STEPS + 2)
    warnings = [alerts.check(step_sample(step=step, loads=(UNEVEN,))) for step in steps]
    assert [len(lines) for lines in warnings] == [0, 0, 0, 1]


def test_a_run_that_asks_for_no_balancing_is_not_warned() -> None:
    alerts = LoadAlerts(limit=1.0, patience=1, early_steps=0, balanced=False)
    assert alerts.check(step_sample(step=99, loads=([400, 0, 0, 0],))) == []


def test_the_limit_itself_is_not_above_the_limit() -> None:
    assert alerts_of(limit=1.0, patience=1).check(step_sample(loads=([200, 100, 50, 50],))) == []


def test_a_floor_above_the_limit_replaces_it() -> None:
    # Four assignments to four experts: MaxVio 1 is below the floor of 1.03.
    assert alerts_of(limit=0.5, patience=1).check(step_sample(loads=([2, 1, 1, 0],))) == []
    assert len(alerts_of(limit=0.5, patience=1).check(step_sample(loads=([3, 1, 0, 0],)))) == 1


def test_skipped_steps_neither_count_nor_reset_the_count() -> None:
    alerts = alerts_of(limit=1.0, patience=2)
    assert alerts.check(step_sample(step=1, loads=(UNEVEN,))) == []
    assert alerts.check(step_sample(step=2, loads=(EVEN,), skipped=True)) == []
    assert len(alerts.check(step_sample(step=3, loads=(UNEVEN,)))) == 1
    assert alerts.check(step_sample(step=4, loads=(DEAD,), skipped=True)) == []


def test_a_model_without_moe_layers_gives_no_warning() -> None:
    assert alerts_of(limit=0.0, patience=1).check(step_sample(loads=())) == []


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="patience=0; it is a number of logged steps"):
        LoadAlerts(limit=1.0, patience=0)
