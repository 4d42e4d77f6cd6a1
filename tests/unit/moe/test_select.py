"""Selection of experts against its slow twin, and what the bias changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.moe.select import BiasInputs, TopK, _Normalize, bias_inputs, biased_scores, gate_scores, select_top_k
from dist_moe.scores import Score
from tests.twin import slow_select

SCORES: list[Score] = ["sigmoid", "softmax", "softmax_selected", "sqrt_softplus"]


@st.composite
def rules(draw: st.DrawFn) -> tuple[TopK, int]:
    """A rule, and a number of experts that fits it."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = draw(st.integers(2, 4))
    topk_groups = draw(st.integers(1, groups))
    rule = TopK(
        top_k=draw(st.integers(1, min(4, topk_groups * size))),
        score=draw(st.sampled_from(SCORES)),
        normalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        topk_groups=topk_groups,
        bias_in_gate_weights=draw(st.booleans()),
    )
    return rule, groups * size


@settings(max_examples=200, deadline=None)
@given(
    rule_and_experts=rules(),
    tokens=st.integers(0, 6),
    biased=st.sampled_from([None, "score_bias_E", "logit_bias_E", "log_weight_E"]),
    seed=st.integers(0, 10_000),
)
def test_selection_equals_its_slow_twin(
    rule_and_experts: tuple[TopK, int], tokens: int, biased: str | None, seed: int
) -> None:
    rule, experts = rule_and_experts
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64, requires_grad=True)
    twins_TE = logits_TE.detach().clone().requires_grad_()
    bias_E = torch.randn(experts, generator=generator)
    inputs = BiasInputs(**{biased: bias_E}) if biased else BiasInputs()
    probe_TK = torch.randn(tokens, rule.top_k, generator=generator, dtype=torch.float64)

    found = select_top_k(logits_TE, rule, *inputs)
    wanted = [slow_select(logits_E, rule, inputs) for logits_E in twins_TE]

    assert found.ids_TK.dtype == torch.int64
    assert found.ids_TK.tolist() == [ids for ids, _ in wanted]
    (found.weights_TK * probe_TK).sum().backward()
    if tokens:
        weights_TK = torch.stack([weights_K for _, weights_K in wanted])
        torch.testing.assert_close(found.weights_TK, weights_TK, rtol=1e-12, atol=1e-12)
        (weights_TK * probe_TK).sum().backward()
        torch.testing.assert_close(logits_TE.grad, twins_TE.grad, rtol=1e-9, atol=1e-12)


def test_trap_T23_normalized_weights_have_the_gradient_of_a_quotient() -> None:
    generator = torch.Generator().manual_seed(0)
    weights_TK = torch.rand(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(_Normalize.apply, weights_TK)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_weight_on_probabilities_is_its_logarithm_on_logits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    log_weight_E = torch.randn(6, generator=generator)
    rule = TopK(top_k=2, score="softmax")
    by_weight, by_logit = (
        select_top_k(logits_TE, rule, log_weight_E=log_weight_E),
        select_top_k(logits_TE, rule, logit_bias_E=log_weight_E),
    )
    assert torch.equal(by_weight.ids_TK, by_logit.ids_TK)
    weighted_TE = logits_TE.softmax(dim=1) * log_weight_E.exp()
    shares_TE = biased_scores(logits_TE, rule, BiasInputs(logit_bias_E=log_weight_E))
    torch.testing.assert_close(shares_TE, weighted_TE / weighted_TE.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("score", "multiplicative", "wanted"),
    [
        ("sigmoid", False, "score_bias_E"),
        ("sqrt_softplus", False, "score_bias_E"),
        ("sigmoid", True, "log_weight_E"),
        ("softmax", False, "logit_bias_E"),
        ("softmax_selected", False, "logit_bias_E"),
    ],
)
def test_the_bias_enters_at_one_point(score: Score, multiplicative: bool, wanted: str) -> None:
    rule = TopK(top_k=1, score=score, multiplicative=multiplicative)
    assert {name for name, value in bias_inputs(rule, BIAS_E)._asdict().items() if value is not None} == {wanted}


LOGITS_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, -0.5, 1.5, -1.5]])
BIAS_E = torch.tensor([0.0, 0.0, 0.0, 9.0])  # every token is sent to expert 3


def biased(rule: TopK, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Select with the bias where it enters for this gate function."""
    if rule.score == "sigmoid":
        return select_top_k(logits_TE, rule, score_bias_E=bias_E)
    return select_top_k(logits_TE, rule, logit_bias_E=bias_E)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_trap_T18_the_bias_changes_the_selection_and_not_the_gate_weights(score: Score) -> None:
    ids_TK, weights_TK = biased(TopK(top_k=2, score=score), LOGITS_TE, BIAS_E)
    assert ids_TK.tolist() == [[3, 0], [3, 2]]
    assert torch.equal(weights_TK, gate_scores(LOGITS_TE, score).gather(1, ids_TK))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_trap_T18_the_bias_has_no_gradient(score: Score) -> None:
    bias_E, logits_TE = BIAS_E.clone().requires_grad_(), LOGITS_TE.clone().requires_grad_()
    biased(TopK(top_k=2, score=score), logits_TE, bias_E)[1].sum().backward()
    assert bias_E.grad is None
    assert logits_TE.grad is not None and logits_TE.grad.any()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_trap_T18_the_gate_gets_a_gradient_at_top_1(score: Score) -> None:
    logits_TE = LOGITS_TE.clone().requires_grad_()
    biased(TopK(top_k=1, score=score), logits_TE, BIAS_E)[1].sum().backward()
    assert logits_TE.grad is not None
    assert (logits_TE.grad[:, 3] > 0.01).all()


def test_a_bias_larger_than_the_gap_of_two_scores_changes_the_selection() -> None:
    rule = TopK(top_k=1, score="sigmoid")
    gap = float(LOGITS_TE[0, 0].sigmoid() - LOGITS_TE[0, 1].sigmoid())
    for bias, wanted in ((gap - 1e-3, 0), (gap + 1e-3, 1)):
        bias_E = torch.tensor([0.0, bias, 0.0, 0.0])
        assert select_top_k(LOGITS_TE[:1], rule, score_bias_E=bias_E).ids_TK.tolist() == [[wanted]]


def test_experts_of_excluded_groups_are_never_selected() -> None:
    # Group 0 holds the best expert, group 1 the better pair; biases below zero do not include an excluded group.
    scores_TE = torch.tensor([[0.9, 0.1, 0.6, 0.7]])
    rule = TopK(top_k=2, score="sigmoid", groups=2, topk_groups=1)
    assert select_top_k(scores_TE.logit(), rule).ids_TK.tolist() == [[3, 2]]
    bias_E = torch.full((4,), -5.0)
    assert select_top_k(scores_TE.logit(), rule, score_bias_E=bias_E).ids_TK.tolist() == [[3, 2]]


@pytest.mark.parametrize("experts", [12, 64])
def test_trap_T37_equal_scores_go_to_the_first_experts(experts: int) -> None:
    logits_TE = torch.zeros(5, experts)
    assert select_top_k(logits_TE, TopK(3, "sigmoid")).ids_TK.tolist() == [[0, 1, 2]] * 5
    grouped = TopK(3, "sigmoid", groups=4, topk_groups=1)
    assert select_top_k(logits_TE, grouped).ids_TK.tolist() == [[0, 1, 2]] * 5
