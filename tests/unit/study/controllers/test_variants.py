"""Tests of the policies of the study: each is allowed by the configuration, and uses the package's own rules."""

from dataclasses import replace

import pytest
import torch

from dist_moe.config.combinations import refusal
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.registry import POLICIES
from dist_moe.study.controllers.figure import STYLES
from dist_moe.study.controllers.scores import Drift, draw_scores
from dist_moe.study.controllers.variants import REFERENCES, VARIANTS, PolicySimulation, PolicyVariant

BY_NAME = {variant.name: variant for variant in VARIANTS}


def run(variant: PolicyVariant, steps: int = 20) -> PolicySimulation:
    simulation = PolicySimulation(variant, experts=8, top_k=2)
    for scores in draw_scores(Drift(), 8, 500, steps, shift_at=12, seed=0):
        simulation.step(scores.logits_TE)
    return simulation


@pytest.mark.parametrize("variant", (*REFERENCES, *VARIANTS), ids=lambda variant: variant.name)
def test_the_configuration_allows_every_variant(variant: PolicyVariant) -> None:
    if variant not in REFERENCES:
        assert refusal(variant.selection, variant.score, variant.policy.policy) is None


def test_names_are_unique_and_have_a_line_in_the_figure() -> None:
    assert len(BY_NAME) == len(VARIANTS)
    assert list(STYLES) == list(BY_NAME)
    assert len(set(STYLES.values())) == len(STYLES)


def test_every_policy_without_gradients_is_included() -> None:
    assert {variant.policy.policy for variant in VARIANTS} == set(POLICIES) - {"auxiliary"}


def test_a_step_is_routed_with_the_bias_from_before_it() -> None:
    simulation = PolicySimulation(BY_NAME["sign, 0.01"], experts=4, top_k=1)
    # Experts 0 to 3 win 5, 1, 2 and 0 of 8 tokens.
    wins = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 0, 0, 1, 2, 2]), 4).float()
    simulation.step(wins)
    assert simulation.max_vio == [1.5]
    assert simulation.bias_E.tolist() == pytest.approx([-0.01, 0.01, 0, 0.01])
    assert simulation.experts_per_token == [1.0]


def test_every_policy_but_none_lowers_max_vio() -> None:
    assert not run(BY_NAME["none"]).bias_E.any()
    for name in ("sign, 0.01", "adaptive, 0.1", "quantile, sigmoid", "quantile, softmax", "EMA quantile, sigmoid"):
        assert run(BY_NAME[name], 12).max_vio[-1] < run(BY_NAME["none"], 12).max_vio[-1], name


def test_adaptive_weights_over_top_k_are_the_proportional_rule_on_logits() -> None:
    adaptive = run(BY_NAME["adaptive, 0.1"])
    proportional = run(replace(BY_NAME["proportional, 0.01"], policy=LossFree(rate=0.1, rule="proportional")))
    assert adaptive.max_vio == proportional.max_vio, "they differ by the mean of the bias, which changes no selection"
    torch.testing.assert_close(adaptive.bias_E, proportional.bias_E - proportional.bias_E.mean())


def test_threshold_routing_measures_experts_per_token() -> None:
    simulation = PolicySimulation(BY_NAME["adaptive threshold, 0.1"], experts=4, top_k=1)
    # Equal probabilities: 2 of 4 experts reach 0.4. A confident token: 1 does.
    simulation.step(torch.tensor([[0.0, 0, 0, 0], [9, 0, 0, 0]]))
    assert simulation.experts_per_token == [1.5]


def test_expert_thresholds_give_each_token_top_k_experts_on_average() -> None:
    simulation = run(BY_NAME["expert threshold"], 12)
    assert simulation.experts_per_token[0] == 2.0, "the highest logits, before the first update"
    assert len(set(simulation.experts_per_token)) > 5
    assert sum(simulation.experts_per_token[4:]) / 8 == pytest.approx(2.0, abs=0.1)
    assert simulation.max_vio[-1] < run(BY_NAME["none"], 12).max_vio[-1]


def test_max_vio_is_measured_against_unequal_shares() -> None:
    simulation = PolicySimulation(BY_NAME["adaptive, 0.1, shares"], experts=8, top_k=2)
    assert simulation.shares == pytest.approx((0.2, 0.2, *[0.1] * 6))
    # Five tokens: 2 of the 10 assignments to each of the first two experts, 1 to each of the others.
    pairs_TK = torch.tensor([[0, 2], [0, 3], [1, 4], [1, 5], [6, 7]])
    simulation.step(torch.zeros(5, 8).scatter_(1, pairs_TK, 1.0))
    assert simulation.max_vio == [pytest.approx(0.0, abs=1e-12)]
