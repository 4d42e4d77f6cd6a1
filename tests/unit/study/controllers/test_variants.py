"""Tests of the policies of the study: each is allowed by the configuration, and uses the package's own rules."""

from dataclasses import replace

import pytest
import torch

from dist_moe.config.combinations import refusal
from dist_moe.policies.loss_free import LossFree
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
    selection = "threshold" if variant.threshold_routing else "top_k"
    assert refusal(selection, variant.score, variant.policy.policy) is None


def test_names_are_unique_and_have_a_line_in_the_figure() -> None:
    assert len(BY_NAME) == len(VARIANTS)
    assert list(STYLES) == list(BY_NAME)
    assert len(set(STYLES.values())) == len(STYLES)


def test_every_policy_without_gradients_is_included() -> None:
    assert {variant.policy.policy for variant in VARIANTS} == {"none", "loss_free", "adaptive_weight", "quantile"}


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
    for name in ("sign, 0.01", "adaptive, 0.1", "quantile, sigmoid", "quantile, softmax"):
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
