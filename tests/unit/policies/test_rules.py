"""The update rules against numpy over random sizes, and properties that all of them have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.balancing.counts import RoutingCounts
from dist_moe.policies.adaptive_weight import AdaptiveWeight, adaptive_weight_update
from dist_moe.policies.base import Policy
from dist_moe.policies.loss_free import LossFree, loss_free_update
from dist_moe.policies.registry import make_policy

loads = st.lists(st.integers(0, 2**40), min_size=1, max_size=12)


def errors(load: list[int]) -> np.ndarray:
    """(mean - c) / mean, in fp64; 0 without any load."""
    counts_E = np.array(load, dtype=np.float64)
    return (counts_E.mean() - counts_E) / max(counts_E.mean(), 1e-300)


def drawn(experts: int, seed: int) -> Tensor:
    """A bias."""
    return torch.randn(experts, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(load=loads, rate=st.sampled_from([0.001, 0.1, 1.0]), seed=st.integers(0, 100), center=st.booleans())
def test_the_proportional_rule_of_loss_free(load: list[int], rate: float, seed: int, center: bool) -> None:
    bias_E = drawn(len(load), seed)
    wanted_E = bias_E.double().numpy() + rate * errors(load)
    wanted_E -= wanted_E.mean() if center else 0.0
    found_E = loss_free_update(bias_E, torch.tensor(load), rate, center, proportional=True)
    assert found_E.dtype == torch.float32
    np.testing.assert_allclose(found_E.numpy(), wanted_E, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(
    load=loads,
    rate=st.sampled_from([0.001, 0.1, 1.0]),
    seed=st.integers(0, 100),
    proportional=st.booleans(),
    clip=st.sampled_from([None, 1.5, 100.0]),
)
def test_the_adaptive_weight(load: list[int], rate: float, seed: int, proportional: bool, clip: float | None) -> None:
    """In weights, not in logarithms: w * exp(rate * e), over the geometric mean, within 1 / clip .. clip."""
    log_weight_E = drawn(len(load), seed)
    error_E = errors(load) if proportional else np.sign(errors(load))
    weight_E = np.exp(log_weight_E.double().numpy()) * np.exp(rate * error_E)
    weight_E /= np.exp(np.log(weight_E).mean())
    weight_E = weight_E if clip is None else np.clip(weight_E, 1 / clip, clip)
    found_E = adaptive_weight_update(log_weight_E, torch.tensor(load), rate, clip, proportional)
    np.testing.assert_allclose(found_E.double().exp().numpy(), weight_E, rtol=2e-5, atol=1e-5)


@settings(deadline=None)
@given(load=loads, seed=st.integers(0, 100))
def test_adaptive_weights_are_the_centered_proportional_bias_on_logits(load: list[int], seed: int) -> None:
    bias_E, load_E = drawn(len(load), seed), torch.tensor(load)
    assert torch.equal(
        adaptive_weight_update(bias_E, load_E, 0.1), loss_free_update(bias_E, load_E, 0.1, True, proportional=True)
    )


RULES: dict[str, Policy] = {
    f"{policy}-{rule}": make_policy(policy, rule=rule)
    for policy in ("loss_free", "adaptive_weight")
    for rule in ("sign", "proportional")
}


@pytest.mark.parametrize("name", RULES)
def test_an_even_load_is_a_fixed_point(name: str) -> None:
    level = RoutingCounts(torch.full((6,), 7), torch.tensor([42]))
    bias_E = drawn(6, 0)
    bias_E -= bias_E.mean()
    torch.testing.assert_close(RULES[name].next_bias(bias_E, level, 0.1), bias_E, rtol=0, atol=1e-6)
    empty = RoutingCounts(torch.zeros(6, dtype=torch.int64), torch.tensor([0]))
    torch.testing.assert_close(RULES[name].next_bias(bias_E, empty, 0.1), bias_E, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_an_overloaded_expert_falls_and_an_underloaded_one_rises(name: str) -> None:
    moved_E = RULES[name].next_bias(torch.zeros(3), RoutingCounts(torch.tensor([8, 4, 0]), torch.tensor([12])), 0.1)
    assert moved_E[0] < moved_E[1] < moved_E[2]


@settings(deadline=None)
@given(load=st.lists(st.integers(0, 1000), min_size=2, max_size=12))
def test_trap_T11_adaptive_weights_keep_their_geometric_mean(load: list[int]) -> None:
    log_weight_E = torch.zeros(len(load))
    for _ in range(50):
        log_weight_E = adaptive_weight_update(log_weight_E, torch.tensor(load), 0.1)
    assert float(log_weight_E.mean()) == pytest.approx(0.0, abs=1e-5)


def test_a_clip_that_bounds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip=1\.0; it bounds"):
        adaptive_weight_update(torch.zeros(2), torch.tensor([1, 2]), 0.1, clip=1.0)


@pytest.mark.parametrize(("bias_dtype", "load_dtype"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int64)])
def test_trap_T05_other_dtypes_are_refused(bias_dtype: torch.dtype, load_dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"takes int64 counts|takes and gives fp32"):
        adaptive_weight_update(torch.zeros(4, dtype=bias_dtype), torch.ones(4, dtype=load_dtype), 0.1)


def test_trap_T11_adaptive_weights_are_centered_by_default() -> None:
    """Null in the config: the paper's rule."""
    layer_counts = RoutingCounts(torch.tensor([9, 1, 1, 1]), torch.tensor([12]))
    loss_free, adaptive_weight = LossFree(), AdaptiveWeight()
    assert loss_free.next_bias(torch.zeros(4), layer_counts, 1.0).tolist() == [-1, 1, 1, 1], "the sign, not centered"
    torch.testing.assert_close(
        adaptive_weight.next_bias(torch.full((4,), 0.5), layer_counts, 1.0), torch.tensor([-2.0, 2 / 3, 2 / 3, 2 / 3])
    )


@pytest.mark.parametrize("name", ["none", "auxiliary"])
def test_a_policy_without_a_rule_moves_no_bias(name: str) -> None:
    policy = make_policy(name, rate=0.1)
    assert not policy.moves_bias
    assert policy.rate_at(0, 10) == 0.0
    with pytest.raises(NotImplementedError, match=f"balance.policy={name} moves no bias"):
        policy.next_bias(torch.zeros(2), RoutingCounts(torch.tensor([1, 2]), torch.tensor([3])), 0.1)


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"balance\.policy='auction' is unknown; use one of none, loss_free,"):
        make_policy("auction")


def test_the_linear_schedule_falls_to_nothing() -> None:
    linear = LossFree(rate=0.4, schedule="linear")
    assert [linear.rate_at(step, 4) for step in range(6)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    assert LossFree(rate=0.5).rate_at(10_000, 4) == 0.5


def test_the_quadratic_schedule_falls_faster_at_first() -> None:
    quadratic = LossFree(rate=0.4, schedule="quadratic")
    assert [quadratic.rate_at(step, 4) for step in range(6)] == pytest.approx([0.4, 0.225, 0.1, 0.025, 0.0, 0.0])


def test_a_frozen_policy_has_no_rate() -> None:
    frozen = LossFree(rate=0.5, schedule="linear", freeze_at=3)
    assert [frozen.rate_at(step, 10) for step in range(5)] == pytest.approx([0.5, 0.45, 0.4, 0.0, 0.0])
    assert [frozen.frozen_at(step) for step in (2, 3)] == [False, True]
