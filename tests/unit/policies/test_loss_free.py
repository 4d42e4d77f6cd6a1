"""The sign rule: against numpy, on integers, and the drift of the mean."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.policies.loss_free import loss_free_update


def reference(bias_E: Tensor, load_E: Tensor, rate: float) -> np.ndarray:
    """Wang et al. 2024, Algorithm 1, lines 4 to 6: c_i, their mean, e_i = mean - c_i, b_i + u * sign(e_i)."""
    counts_E = np.array([int(count) for count in load_E], dtype=object)
    errors_E = [int(counts_E.sum()) - len(counts_E) * count for count in counts_E]
    signs_E = np.array([(error > 0) - (error < 0) for error in errors_E], dtype=np.float32)
    return bias_E.numpy() + np.float32(rate) * signs_E


@settings(deadline=None)
@given(
    load=st.lists(st.integers(0, 2**40), min_size=1, max_size=12),
    rate=st.sampled_from([0.001, 0.01, 1.0]),
    seed=st.integers(0, 100),
)
def test_the_rule_is_algorithm_1(load: list[int], rate: float, seed: int) -> None:
    bias_E = torch.randn(len(load), generator=torch.Generator().manual_seed(seed))
    before_E, load_E = bias_E.clone(), torch.tensor(load)
    found_E = loss_free_update(bias_E, load_E, rate)
    assert found_E.dtype == torch.float32
    assert np.array_equal(found_E.numpy(), reference(bias_E, load_E, rate))
    assert torch.equal(bias_E, before_E), "a new tensor"


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12), st.permutations(range(12)))
def test_the_rule_is_independent_of_the_order_of_experts(load: list[int], permutation: list[int]) -> None:
    load_E, bias_E = torch.tensor(load), torch.zeros(len(load))
    order = torch.tensor([place for place in permutation if place < len(load)])
    moved_E = loss_free_update(bias_E, load_E, 0.01)
    assert torch.equal(loss_free_update(bias_E, load_E[order], 0.01), moved_E[order])


def test_the_sign_by_hand() -> None:
    load_E = torch.tensor([1, 4, 3, 4])  # mean 3
    assert loss_free_update(torch.zeros(4), load_E, 0.5).tolist() == [0.5, -0.5, 0.0, -0.5]
    assert not loss_free_update(torch.zeros(4), torch.zeros(4, dtype=torch.int64), 0.5).any()


def test_trap_T05_one_token_above_2_to_the_24_has_a_sign() -> None:
    load_E = torch.tensor([2**24 + 1, 2**24])
    assert load_E.float()[0] == load_E.float()[1], "fp32 cannot distinguish these counts"
    assert loss_free_update(torch.zeros(2), load_E, 1.0).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("bias_dtype", "load_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.int64)])
def test_other_dtypes_are_refused(bias_dtype: torch.dtype, load_dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"takes int64 counts|takes and gives fp32"):
        loss_free_update(torch.zeros(4, dtype=bias_dtype), torch.ones(4, dtype=load_dtype), 0.1)


HOT_E = torch.tensor([93, 1, 1, 1, 1, 1, 1, 1])  # one hot expert of 8


def after(steps: int, center: bool) -> Tensor:
    """The bias after so many steps with the hot expert, at u = 0.001."""
    bias_E = torch.zeros(8)
    for _ in range(steps):
        bias_E = loss_free_update(bias_E, HOT_E, 0.001, center)
    return bias_E


def test_trap_T11_the_plain_rule_drifts_by_three_quarters_of_u_a_step() -> None:
    assert float(after(1, center=False).mean()) == pytest.approx(0.75e-3, rel=1e-5)
    assert float(after(1000, center=False).mean()) == pytest.approx(0.75, rel=1e-3)


def test_trap_T11_centering_keeps_the_mean_and_the_differences() -> None:
    centred_E, plain_E = after(1000, center=True), after(1000, center=False)
    assert float(centred_E.mean()) == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(centred_E - centred_E[0], plain_E - plain_E[0], rtol=1e-3, atol=1e-3)
