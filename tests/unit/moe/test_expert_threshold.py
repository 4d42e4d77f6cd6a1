"""Routing by expert thresholds against a slow twin, at its limits, and that each expert gets its share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.balancing.balancer import Balancer
from dist_moe.model.routing import count_record
from dist_moe.moe.router import Router
from dist_moe.moe.select import ExpertThreshold, select_by_expert_threshold
from dist_moe.policies.expert_threshold import ExpertThresholds
from tests.twin import slow_gate


def slow_select(logits_E: Tensor, rule: ExpertThreshold, bias_E: Tensor) -> tuple[list[int], Tensor]:
    """The experts of one token, the one furthest above its threshold first; and their weights."""
    biased = (logits_E.detach() + bias_E).tolist()
    order = sorted(range(len(biased)), key=lambda expert: -biased[expert])
    started = any(bias_E.tolist())
    ids = [expert for expert in order if biased[expert] > 0] if started else order[: rule.top_k]
    ids = (ids or order[: rule.min_experts])[: rule.max_experts]
    weights_K = slow_gate(logits_E, rule.score)[ids]
    if rule.normalize and ids:
        weights_K = weights_K / weights_K.sum()
    return ids, weights_K * rule.routed_scaling_factor


@st.composite
def rules(draw: st.DrawFn) -> tuple[ExpertThreshold, int]:
    """A rule, and a number of experts that fits it."""
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    rule = ExpertThreshold(
        top_k=top_k,
        max_experts=draw(st.integers(top_k, experts)),
        min_experts=draw(st.integers(0, 1)),
        score=draw(st.sampled_from(["sigmoid", "sqrt_softplus"])),
        normalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )
    return rule, experts


@settings(max_examples=200, deadline=None)
@given(rule_and_experts=rules(), tokens=st.integers(0, 6), biased=st.booleans(), seed=st.integers(0, 10_000))
def test_selection_equals_its_slow_twin(
    rule_and_experts: tuple[ExpertThreshold, int], tokens: int, biased: bool, seed: int
) -> None:
    rule, experts = rule_and_experts
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64).requires_grad_()
    twins_TE = logits_TE.detach().clone().requires_grad_()
    bias_E = torch.randn(experts, generator=generator) - 0.5 if biased else torch.zeros(experts)

    found = select_by_expert_threshold(logits_TE, rule, bias_E)
    wanted = [slow_select(logits_E, rule, bias_E) for logits_E in twins_TE]

    assert [[expert for expert in ids if expert >= 0] for ids in found.ids_TK.tolist()] == [ids for ids, _ in wanted]
    assert found.ids_TK.shape[1] == max([1, *(len(ids) for ids, _ in wanted)]), "no column that is empty for all tokens"
    assert not found.weights_TK[found.ids_TK < 0].any()
    probe_TK = torch.randn(found.weights_TK.shape, generator=generator, dtype=torch.float64)
    slow = sum((weights @ probe_K[: len(ids)] for (ids, weights), probe_K in zip(wanted, probe_TK, strict=True)))
    if isinstance(slow, Tensor):
        (found.weights_TK * probe_TK).sum().backward()
        slow.backward()
        torch.testing.assert_close((found.weights_TK * probe_TK).sum(), slow, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(logits_TE.grad, twins_TE.grad, rtol=1e-8, atol=1e-12)


def taken(
    logits: list[float], thresholds: list[float], top_k: int = 2, max_experts: int | None = None, min_experts: int = 0
) -> list[int]:
    """The experts of a token with these logits."""
    rule = ExpertThreshold(top_k, max_experts or len(logits), min_experts, "sigmoid")
    ids_TK = select_by_expert_threshold(torch.tensor([logits]), rule, -torch.tensor(thresholds)).ids_TK
    return [expert for expert in ids_TK[0].tolist() if expert >= 0]


def test_trap_T37_a_token_takes_each_expert_above_its_own_threshold() -> None:
    assert taken([0.3, 2.0, -1.0, 1.0], [0.2, 2.5, -3.0, 1.5]) == [2, 0], "2 is below its threshold, and -1 above"
    assert taken([0.3, 2.0, -1.0, 1.0], [0.2, 2.5, -3.0, 1.5], max_experts=1, top_k=1) == [2]
    assert taken([1.0, 1.0], [1.0, 0.5]) == [1], "above, not at"


def test_trap_T37_a_token_may_take_none_unless_it_has_to() -> None:
    assert taken([0.0, 1.0], [2.0, 1.5]) == []
    assert taken([0.0, 1.0], [2.0, 1.5], min_experts=1) == [1], "the one closest to its threshold"


def test_before_the_first_update_a_token_takes_its_highest_logits() -> None:
    assert taken([-3.0, -1.0, -2.0], [0.0, 0.0, 0.0]) == [1, 2]


def route(router: Router, logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Route tokens whose logits are their hidden states -> ids_TK; the record stays open."""
    router.open_record(mask_T)
    ids_TK: Tensor = router(logits_TE)[2]
    return ids_TK


def make_router(experts: int = 8, top_k: int = 2, min_experts: int = 0) -> Router:
    """A router whose logits are its hidden states."""
    router = Router(experts, experts, ExpertThreshold(top_k, experts, min_experts, "sigmoid"))
    torch.nn.init.eye_(router.weight)
    return router


def drawn(step: int, tokens: int = 4096) -> Tensor:
    """The logits of a step; experts have different means and spreads."""
    noise_TE = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(step))
    return noise_TE * torch.linspace(0.5, 2, 8) + torch.linspace(-1, 1, 8)


def test_trap_T80_each_expert_gets_its_share_and_each_token_top_k_experts_on_average() -> None:
    router = make_router()
    balancer = Balancer({"a": router}, ExpertThresholds(), torch.device("cpu"), 100)
    for step in range(20):
        route(router, drawn(step))
        balancer.observe([count_record(router, router.close_record(), needs_margins=True)])
        (counts,) = balancer.step()
    assert (counts.load_E / 4096).tolist() == pytest.approx([0.25] * 8, abs=0.03)
    assert int(counts.load_E.sum()) / 4096 == pytest.approx(2.0, abs=0.1)
    quantile_E = torch.cat([drawn(step) for step in range(20)]).quantile(0.75, dim=0)
    torch.testing.assert_close(-router.selection_bias, quantile_E, rtol=0, atol=0.05)
    assert counts.unrouted is not None and int(counts.unrouted) > 100, "some tokens are above no threshold"
    assert int(counts.unrouted) + int(counts.k_histogram_K.sum()) == 4096


def test_unequal_shares_are_reached_too() -> None:
    router = make_router()
    balancer = Balancer({"a": router}, ExpertThresholds(shares={"0": 0.3}), torch.device("cpu"), 100)
    for step in range(20):
        route(router, drawn(step))
        balancer.observe([count_record(router, router.close_record(), needs_margins=True)])
        (counts,) = balancer.step()
    assert (counts.load_E / 4096).tolist() == pytest.approx([0.6, *[0.2] * 7], abs=0.03)


def test_trap_T04_padding_is_neither_routed_nor_counted_as_a_token_without_experts() -> None:
    router = make_router(experts=2, top_k=1)
    router.selection_bias.copy_(torch.tensor([-1.0, -1.0]))
    logits_TE = torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    ids_TK = route(router, logits_TE, torch.tensor([True, True, False, False]))
    counts = count_record(router, router.close_record(), needs_margins=True)
    assert ids_TK.tolist() == [[0, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert counts.unrouted is not None and counts.margins_EQ is not None
    assert (int(counts.unrouted), counts.k_histogram_K.tolist(), counts.margins_EQ.sum(dim=1).tolist()) == (
        1,
        [1, 0],
        [2, 2],
    )


def test_the_selection_of_a_token_does_not_depend_on_the_others() -> None:
    router = make_router()
    router.selection_bias.copy_(torch.linspace(-1, 1, 8))
    logits_TE = drawn(0, tokens=50)
    together = select_by_expert_threshold(logits_TE, router.rule, router.selection_bias).ids_TK  # type: ignore[arg-type]
    for token, ids_K in enumerate(together.tolist()):
        alone = select_by_expert_threshold(logits_TE[token : token + 1], router.rule, router.selection_bias)  # type: ignore[arg-type]
        assert [one for one in alone.ids_TK[0].tolist() if one >= 0] == [one for one in ids_K if one >= 0]
