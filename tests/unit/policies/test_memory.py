"""The rules with a memory: against slow ones in fp64 over random histories, by hand, and at their limits."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.balancing.counts import RoutingCounts
from dist_moe.balancing.margins import BINS, count_margins
from dist_moe.policies.base import BiasPolicy, RuleState
from dist_moe.policies.ema_quantile import SUM, WEIGHT, EmaQuantile
from dist_moe.policies.expert_threshold import ExpertThresholds
from dist_moe.policies.load_error import LoadErrorPolicy
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.momentum import Momentum, momentum_update
from dist_moe.policies.quantile import Quantile
from dist_moe.policies.registry import POLICIES, make_policy

WITH_MEMORY = [name for name, policy in POLICIES.items() if policy.memory]


def start(policy: BiasPolicy, experts: int) -> RuleState:
    """The state before the first update."""
    return RuleState(torch.zeros(experts), {name: torch.zeros(experts) for name in policy.memory})


def loaded(*load: int) -> RoutingCounts:
    """The counts of a layer with this load, by tokens that took one expert each."""
    return RoutingCounts(torch.tensor(load), torch.tensor([sum(load)]))


def spread(seed: int, bias_E: Tensor, top_k: int = 2, tokens: int = 400) -> RoutingCounts:
    """The counts of random tokens of experts with offsets, with margins."""
    experts = len(bias_E)
    scores_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) + torch.arange(experts) / 4
    margins_EQ = count_margins(scores_TE, bias_E, top_k)
    ids_TK = (scores_TE + bias_E).topk(top_k).indices
    return RoutingCounts(ids_TK.flatten().bincount(minlength=experts), torch.tensor([0, tokens]), margins_EQ)


@settings(deadline=None, max_examples=50)
@given(
    history=st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4), min_size=1, max_size=6),
    rate=st.sampled_from([0.001, 0.5]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    sharpness=st.sampled_from([0.1, 2.0, 50.0]),
    limit=st.sampled_from([None, 0.01]),
    center=st.booleans(),
)
def test_momentum_equals_a_loop_over_experts(
    history: list[list[int]], rate: float, momentum: float, sharpness: float, limit: float | None, center: bool
) -> None:
    policy = Momentum(momentum=momentum, sharpness=sharpness, bias_limit=limit, center=center)
    state, bias, velocity = start(policy, 4), [0.0] * 4, [0.0] * 4
    for load in history:
        state = policy.next_state(state, loaded(*load), rate)
        mean = sum(load) / 4
        changes = [rate * np.tanh(sharpness * (mean - count) / mean) if mean else 0.0 for count in load]
        shift = sum(changes) / 4 if center else 0.0
        velocity = [
            momentum * v + (1 - momentum) * (change - shift) for v, change in zip(velocity, changes, strict=True)
        ]
        bias = [b + v for b, v in zip(bias, velocity, strict=True)]
        bias = bias if limit is None else [min(max(b, -limit), limit) for b in bias]
    np.testing.assert_allclose(state.bias_E.numpy(), bias, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(state.memory["momentum"].numpy(), velocity, rtol=2e-5, atol=2e-6)
    assert state.bias_E.dtype == state.memory["momentum"].dtype == torch.float32


def test_trap_T80_momentum_by_hand() -> None:
    """Loads 4, 3, 1, 8 with mean 4: errors 0, 1/4, 3/4, -1; tanh of twice that 0, .46212, .90515, -.96403."""
    bias_E, momentum_E = momentum_update(torch.zeros(4), torch.zeros(4), torch.tensor([4, 3, 1, 8]), rate=0.1)
    # Times 0.1, less their mean .010081, and half of it.
    assert bias_E.tolist() == pytest.approx([-0.005040, 0.018066, 0.040217, -0.053242], abs=1e-6)
    assert torch.equal(bias_E, momentum_E)
    again_E, _ = momentum_update(bias_E, momentum_E, torch.tensor([4, 4, 4, 4]), rate=0.1)
    torch.testing.assert_close(again_E, 1.5 * bias_E)  # an even load adds nothing, and half of the momentum remains


def test_a_sharp_clamp_without_momentum_is_the_sign_rule() -> None:
    load_E = torch.tensor([9, 1, 4, 2])
    bias_E, _ = momentum_update(torch.zeros(4), torch.zeros(4), load_E, 0.5, momentum=0.0, sharpness=1e6, center=False)
    assert bias_E.tolist() == LossFree().next_bias(torch.zeros(4), loaded(9, 1, 4, 2), 0.5).tolist()


def test_a_change_is_at_most_the_rate() -> None:
    policy = Momentum(center=False)
    state = start(policy, 3)
    for _ in range(50):
        before_E = state.bias_E
        state = policy.next_state(state, loaded(1_000_000, 0, 1), 0.25)
        assert (state.bias_E - before_E).abs().max() <= 0.25


def test_trap_T80_the_bias_stays_within_its_limit() -> None:
    policy = Momentum(bias_limit=0.3)
    state = start(policy, 3)
    for _ in range(50):
        state = policy.next_state(state, loaded(9, 0, 0), 0.1)
    assert float(state.bias_E.abs().max()) == pytest.approx(0.3)


@settings(deadline=None, max_examples=25)
@given(seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=5), decay=st.sampled_from([0.0, 0.5, 0.9]))
def test_trap_T80_the_ema_quantile_is_the_weighted_mean_of_the_quantile_biases(seeds: list[int], decay: float) -> None:
    """The bias after n steps: sum of decay**(n - t) * q_t over sum of decay**(n - t)."""
    policy, quantile = EmaQuantile(decay=decay), Quantile()
    state, single = start(policy, 6), []
    for seed in seeds:
        counts = spread(seed, state.bias_E)
        single.append(quantile.next_bias(state.bias_E, counts, 0.0).double().numpy())
        state = policy.next_state(state, counts, 0.0)
    weights = [decay ** (len(seeds) - 1 - place) for place in range(len(seeds))]
    wanted_E = sum(weight * bias for weight, bias in zip(weights, single, strict=True)) / sum(weights)
    np.testing.assert_allclose(state.bias_E.numpy(), wanted_E, rtol=1e-4, atol=1e-5)


def test_the_first_step_of_ema_quantile_is_that_of_quantile() -> None:
    counts = spread(3, torch.zeros(5))
    found, wanted_E = EmaQuantile().next_state(start(EmaQuantile(), 5), counts, 0.0), Quantile()
    torch.testing.assert_close(found.bias_E, wanted_E.next_bias(torch.zeros(5), counts, 0.0))
    assert found.memory[WEIGHT].tolist() == pytest.approx([0.1] * 5)


def test_the_average_has_less_noise_than_a_single_step() -> None:
    deviations = []
    for policy in (Quantile(), EmaQuantile()):
        state, seen = start(policy, 8), []
        for step in range(60):
            state = policy.next_state(state, spread(step, state.bias_E, tokens=200), 0.0)
            seen.append(state.bias_E)
        deviations.append(float(torch.stack(seen[20:]).std(dim=0).mean()))
    assert deviations[1] < deviations[0] / 2


@pytest.mark.parametrize("policy", [EmaQuantile(), ExpertThresholds()], ids=lambda policy: policy.policy)
def test_a_step_without_tokens_changes_no_average(policy: BiasPolicy) -> None:
    empty = RoutingCounts(torch.zeros(3, dtype=torch.int64), torch.tensor([0]), torch.zeros(3, BINS, dtype=torch.int64))
    memory = {SUM: torch.tensor([0.2, 0.4, 0.6]), WEIGHT: torch.full((3,), 0.5)}
    found = policy.next_state(RuleState(torch.tensor([0.4, 0.8, 1.2]), memory), empty, 0.0)
    assert found.bias_E.tolist() == pytest.approx([0.4, 0.8, 1.2])
    assert_equal(found.memory, memory)


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_rule_with_a_memory_is_pure(name: str) -> None:
    """The state it is given stays as it is, and equal arguments give equal results."""
    policy = make_policy(name)
    assert isinstance(policy, BiasPolicy)
    state = policy.next_state(start(policy, 6), spread(1, torch.zeros(6)), 0.1)
    kept = RuleState(state.bias_E.clone(), {kind: value.clone() for kind, value in state.memory.items()})
    results = [policy.next_state(state, spread(2, state.bias_E), 0.1) for _ in range(2)]
    assert torch.equal(state.bias_E, kept.bias_E)
    assert_equal(state.memory, kept.memory)
    assert torch.equal(results[0].bias_E, results[1].bias_E)
    assert_equal(results[0].memory, results[1].memory)
    assert set(results[0].memory) == set(policy.memory)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if issubclass(policy, LoadErrorPolicy)])
def test_a_rule_without_a_memory_is_its_next_bias(name: str) -> None:
    policy = make_policy(name)
    bias_E = torch.tensor([0.5, -0.5, 0.0])
    found = policy.next_state(RuleState(bias_E, {}), loaded(5, 1, 0), 0.1)
    assert torch.equal(found.bias_E, policy.next_bias(bias_E, loaded(5, 1, 0), 0.1)) and found.memory == {}
