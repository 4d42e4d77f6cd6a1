"""The contenders: each is a policy that the config allows, and takes its steps by the project's own rules."""

from dataclasses import replace

import pytest
import torch

from dist_moe.config.combinations import refusal
from dist_moe.study.contenders import CONTENDERS, LEVEL, Contender, Course
from dist_moe.study.figure import STYLES
from dist_moe.study.scores import Drift, draw_scores

BY_NAME = {contender.name: contender for contender in CONTENDERS}


def run(contender: Contender, steps: int = 20) -> Course:
    course = Course(contender, experts=8, top_k=2)
    for drawn in draw_scores(Drift(), 8, 500, steps, shift_at=12, seed=0):
        course.step(drawn.logits_TE)
    return course


@pytest.mark.parametrize("contender", (*LEVEL, *CONTENDERS), ids=lambda contender: contender.name)
def test_a_contender_is_one_that_the_config_allows(contender: Contender) -> None:
    selection = "threshold" if contender.by_threshold else "top_k"
    assert refusal(selection, contender.score, contender.policy) is None


def test_names_differ_and_each_has_a_line_in_the_picture() -> None:
    assert len(BY_NAME) == len(CONTENDERS)
    assert list(STYLES) == list(BY_NAME)
    assert len(set(STYLES.values())) == len(STYLES)


def test_every_policy_that_works_without_gradients_takes_part() -> None:
    assert {contender.policy for contender in CONTENDERS} == {"none", "loss_free", "adaptive_weight", "quantile"}


def test_a_step_is_routed_by_the_bias_from_before_it() -> None:
    course = Course(BY_NAME["sign, 0.01"], experts=4, top_k=1)
    # Experts 0 to 3 win 5, 1, 2 and 0 of 8 tokens.
    wins = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 0, 0, 1, 2, 2]), 4).float()
    course.step(wins)
    assert course.max_vio == [1.5]
    assert course.bias_E.tolist() == pytest.approx([-0.01, 0.01, 0, 0.01])
    assert course.experts_a_token == [1.0]


def test_none_moves_nothing_and_the_others_level_what_they_can() -> None:
    assert not run(BY_NAME["none"]).bias_E.any()
    for name in ("sign, 0.01", "adaptive, 0.1", "quantile, sigmoid", "quantile, softmax"):
        assert run(BY_NAME[name], 12).max_vio[-1] < run(BY_NAME["none"], 12).max_vio[-1], name


def test_adaptive_weights_over_top_k_are_the_proportional_rule_on_logits() -> None:
    adaptive = run(BY_NAME["adaptive, 0.1"])
    proportional = run(replace(BY_NAME["proportional, 0.01"], rate=0.1))
    assert adaptive.max_vio == proportional.max_vio, "they differ by the mean of the bias, which moves no selection"
    torch.testing.assert_close(adaptive.bias_E, proportional.bias_E - proportional.bias_E.mean())


def test_threshold_routing_counts_the_experts_that_a_token_takes() -> None:
    course = Course(BY_NAME["adaptive threshold, 0.1"], experts=4, top_k=1)
    # Level: 2 of 4 reach 0.4. Confident: 1 does.
    course.step(torch.tensor([[0.0, 0, 0, 0], [9, 0, 0, 0]]))
    assert course.experts_a_token == [1.5]
