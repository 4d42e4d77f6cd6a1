"""Tests of the measures on given series, and of the prediction for the sign rule against the rule itself."""

import pytest
import torch

from dist_moe.balancing.counts import count_routing
from dist_moe.balancing.load import max_vio
from dist_moe.moe.select import TopK, select
from dist_moe.policies.loss_free import loss_free_update
from dist_moe.study.controllers.measures import Convergence, balancing_bias, measure, sign_steps, steps_to_reach


@pytest.mark.parametrize(
    ("series", "steps"),
    [
        ([1, 1, 1], 0),
        ([9, 9, 1, 1, 1], 2),
        ([9, 1, 9, 9, 1, 1, 1], 4),  # one lucky step is not enough
        ([9, 1, 9, 1, 9, 1, 1], 1),  # one unlucky step does not matter
        ([9, 1, 1], None),  # the median at 0 is low enough, but the step itself is not
        ([9, 9, 9, 1, 1], None),  # no whole window is left
        ([2, 2, 2], 0),
        ([], None),
    ],
)
def test_steps_to_reach_a_level(series: list[float], steps: int | None) -> None:
    assert steps_to_reach(series, level=2, window=3) == steps


def test_a_series_is_measured_before_and_after_the_shift() -> None:
    # Steps 0 to 39 come before the shift: from 1.0 down to the floor in 10; then 0.11 and 0.13 in turn.
    before = [1.0] * 10 + [0.1] * 20 + [0.11, 0.13] * 5
    after = [2.0] * 6 + [0.14] * 3 + [0.1] * 12
    measures = measure(before + after, [2.0] + [3.0] * 60, floor=0.1, shift_at=40, predicted=(12.0, None))
    assert measures.start == Convergence(near=10, at_floor=10, predicted=12.0)
    assert measures.shift == Convergence(near=6, at_floor=9, predicted=None)
    assert (measures.ripple, measures.ripple_std) == (pytest.approx(0.02), pytest.approx(0.01))
    assert (measures.floor, measures.experts_first, measures.experts_steady) == (0.1, 2.0, 3.0)


def test_an_unbalanced_series_has_no_steps() -> None:
    measures = measure([1.0] * 60, [2.0] * 60, floor=0.1, shift_at=30, predicted=(None, None))
    assert measures.start == measures.shift == Convergence(None, None, None)


def test_sign_steps_are_the_distance_over_twice_the_rate() -> None:
    assert sign_steps(torch.tensor([0.3, -0.1]), rate=0.01) == pytest.approx(20)
    assert sign_steps(torch.tensor([1.3, 0.9, 1.0]), rate=0.1) == pytest.approx(2)
    assert sign_steps(torch.tensor([0.5, 0.5]), rate=0.1) == 0


def test_the_sign_rule_takes_the_predicted_steps_with_two_experts() -> None:
    logits_TE = torch.randn(4001, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0.0])
    target_E = balancing_bias([logits_TE.sigmoid()], top_k=1, rounds=30)
    bias_E = torch.zeros(2)
    rate, steps = 0.005, 0
    while int((load_E := count_routing(select(logits_TE, TopK(1, "sigmoid"), bias_E).ids_TK, 2, 1).load_E)[0]) > 2000:
        bias_E = loss_free_update(bias_E, load_E, rate)
        steps += 1
    assert steps > 10
    assert steps == pytest.approx(sign_steps(target_E, rate), abs=1.5)


def test_the_balancing_bias_gives_every_expert_its_share() -> None:
    source = torch.Generator().manual_seed(0)
    offset_E = torch.linspace(-1, 1, 6)
    batches = [(torch.randn(3000, 6, generator=source) + offset_E).sigmoid() for _ in range(2)]
    bias_E = balancing_bias(batches, top_k=2, rounds=30)
    logits_TE = torch.cat(batches).logit()
    loads = {
        name: count_routing(select(logits_TE, TopK(2, "sigmoid"), bias).ids_TK, 6, 2).load_E
        for name, bias in (("balanced", bias_E), ("unbiased", torch.zeros(6)))
    }
    assert float(max_vio(loads["balanced"])) < 0.02 < 0.5 < float(max_vio(loads["unbiased"]))
    assert float(bias_E.mean()) == pytest.approx(0, abs=1e-6)
    assert int(bias_E.argmin()) == 5, "the most popular expert has the lowest bias"
