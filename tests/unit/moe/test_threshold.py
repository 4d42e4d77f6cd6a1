"""Threshold routing against its slow twin, at its limits, and with weights of experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.moe.router import Router
from dist_moe.moe.select import ThresholdRouting, select_by_threshold
from tests.twin import slow_select_by_threshold


@st.composite
def rules(draw: st.DrawFn) -> tuple[ThresholdRouting, int]:
    """A rule, and a number of experts that fits it."""
    experts = draw(st.integers(1, 9))
    rule = ThresholdRouting(
        threshold=draw(st.sampled_from([0.01, 0.25, 0.4, 0.7, 0.9, 0.999])),
        max_experts=draw(st.integers(1, experts)),
        normalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        bias_in_gate_weights=draw(st.booleans()),
    )
    return rule, experts


@settings(max_examples=200, deadline=None)
@given(
    rule_and_experts=rules(),
    tokens=st.integers(0, 6),
    biased=st.booleans(),
    sharpness=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 10_000),
)
def test_selection_equals_its_slow_twin(
    rule_and_experts: tuple[ThresholdRouting, int], tokens: int, biased: bool, sharpness: float, seed: int
) -> None:
    rule, experts = rule_and_experts
    generator = torch.Generator().manual_seed(seed)
    noise_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    logits_TE = (sharpness * noise_TE + 1e-3 * torch.rand(experts, generator=generator)).requires_grad_()
    twins_TE = logits_TE.detach().clone().requires_grad_()
    bias_E = torch.randn(experts, generator=generator) if biased else None

    found = select_by_threshold(logits_TE, rule, rule.threshold, bias_E)
    wanted = [slow_select_by_threshold(logits_E, rule, rule.threshold, bias_E) for logits_E in twins_TE]

    assert [[expert for expert in ids if expert >= 0] for ids in found.ids_TK.tolist()] == [ids for ids, _ in wanted]
    assert found.ids_TK.shape[1] == max([1, *(len(ids) for ids, _ in wanted)]), "no column that is empty for all tokens"
    assert not found.weights_TK[found.ids_TK < 0].any()
    probe_TK = torch.randn(found.weights_TK.shape, generator=generator, dtype=torch.float64)
    (found.weights_TK * probe_TK).sum().backward()
    if tokens:
        slow = sum((weights @ probe_K[: len(ids)] for (ids, weights), probe_K in zip(wanted, probe_TK, strict=True)))
        assert isinstance(slow, torch.Tensor)
        slow.backward()
        torch.testing.assert_close((found.weights_TK * probe_TK).sum(), slow, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(logits_TE.grad, twins_TE.grad, rtol=1e-8, atol=1e-12)


def taken(probabilities: list[float], threshold: float, max_experts: int | None = None) -> list[int]:
    """The experts of a token with these probabilities."""
    rule = ThresholdRouting(threshold, max_experts or len(probabilities))
    ids_TK = select_by_threshold(torch.tensor([probabilities]).log(), rule, threshold).ids_TK
    return [expert for expert in ids_TK[0].tolist() if expert >= 0]


def test_trap_T37_a_confident_token_takes_one_expert_and_not_none() -> None:
    assert taken([0.05, 0.9, 0.05], threshold=0.4) == [1]


@pytest.mark.parametrize(
    ("threshold", "wanted"), [(0.1, [2]), (0.49, [2]), (0.51, [2, 0]), (0.79, [2, 0]), (0.81, [2, 0, 1])]
)
def test_trap_T37_the_expert_that_crosses_the_threshold_is_taken(threshold: float, wanted: list[int]) -> None:
    assert taken([0.3, 0.15, 0.5, 0.05], threshold) == wanted


def test_a_token_takes_at_most_max_experts() -> None:
    assert taken([0.25] * 4, threshold=0.99, max_experts=2) == [0, 1], "equal ones in order of their id"


def test_the_threshold_of_the_call_replaces_that_of_the_rule() -> None:
    logits_TE, rule = torch.tensor([[0.5, 0.3, 0.2]]).log(), ThresholdRouting(0.1, 3)
    assert select_by_threshold(logits_TE, rule, torch.tensor(0.7)).ids_TK.tolist() == [[0, 1]]


def test_trap_T18_the_weight_of_an_expert_changes_the_selection_and_not_the_gate_weights() -> None:
    logits_TE = torch.tensor([[0.6, 0.3, 0.1]]).log()
    log_weight_E = torch.tensor([0.1, 1.0, 10.0]).log()  # weighted: 0.06, 0.3, 1.0
    plain = select_by_threshold(logits_TE, ThresholdRouting(0.5, 3), 0.5, log_weight_E)
    assert plain.ids_TK.tolist() == [[2]]
    torch.testing.assert_close(plain.weights_TK, torch.tensor([[0.1]]))
    shaped = select_by_threshold(logits_TE, ThresholdRouting(0.5, 3, bias_in_gate_weights=True), 0.5, log_weight_E)
    assert shaped.ids_TK.tolist() == [[2]]
    torch.testing.assert_close(shaped.weights_TK, torch.tensor([[1.0 / 1.36]]))


def test_trap_T36_each_weight_is_that_of_its_expert() -> None:
    """Probabilities in another order than the experts' ids."""
    probabilities = [0.05, 0.3, 0.15, 0.5]
    routing = select_by_threshold(torch.tensor([probabilities]).log(), ThresholdRouting(0.9, 4), 0.9)
    assert routing.ids_TK.tolist() == [[3, 1, 2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.5, 0.3, 0.15]]))


def test_trap_T12_the_threshold_stays_fp32_in_a_bf16_model() -> None:
    router = Router(4, 8, ThresholdRouting(0.4001, 4))
    router.bfloat16()
    assert router.threshold is not None
    assert (router.threshold.dtype, float(router.threshold)) == (torch.float32, pytest.approx(0.4001))
    assert "threshold" in router.state_dict() and "last_load" not in router.state_dict()
