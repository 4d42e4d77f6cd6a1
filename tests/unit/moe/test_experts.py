"""The experts of a rank: grouped products against one product per expert, and their backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dist_moe.moe.experts import BiasedExperts, GroupedExperts, gate, grouped_linear, is_silu


def slow_grouped_linear(rows_QD: Tensor, weight_eHD: Tensor, counts: list[int]) -> Tensor:
    """The slow twin: one product for each expert."""
    parts = rows_QD.split(counts)
    return torch.cat([part @ weight_HD.T for part, weight_HD in zip(parts, weight_eHD, strict=True)])


def ends(counts: list[int]) -> Tensor:
    """The index after the last row of each group."""
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 3, 7]), min_size=1, max_size=5),
    sizes=st.sampled_from([(4, 8), (8, 4), (5, 3), (4, 6)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_grouped_linear_equals_one_product_per_expert(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, out = sizes
    values = torch.randn(sum(counts), width + out, generator=generator, dtype=torch.float64)
    rows_QD, probe_QH = values[:, :width].to(dtype).contiguous(), values[:, width:].to(dtype)
    weight_eHD = torch.randn(len(counts), out, width, generator=generator, dtype=torch.float64).to(dtype)
    fast = [rows_QD.requires_grad_(), weight_eHD.requires_grad_()]
    slow = [leaf.detach().clone().requires_grad_() for leaf in fast]
    found_QH, wanted_QH = grouped_linear(fast[0], fast[1], ends(counts)), slow_grouped_linear(slow[0], slow[1], counts)
    for result_QH in (found_QH, wanted_QH):
        (result_QH * probe_QH).sum().backward()
    gradients = [[leaf.grad for leaf in leaves] for leaves in (fast, slow)]
    torch.testing.assert_close([found_QH, *gradients[0]], [wanted_QH, *gradients[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_trap_T38_backward_takes_an_expanded_gradient(dtype: torch.dtype) -> None:
    """The gradient of a sum is one number in every place, with stride 0."""
    experts = GroupedExperts(2, 16, 8, F.silu).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows_QD = torch.ones(5, 16, dtype=dtype, requires_grad=True)
    results_QD = experts(rows_QD, torch.ones(5, dtype=dtype), ends([2, 3]))
    (wanted_QD,) = torch.autograd.grad(results_QD, rows_QD, torch.ones_like(results_QD), retain_graph=True)
    (found_QD,) = torch.autograd.grad(results_QD.sum(), rows_QD)
    assert found_QD.any() and torch.equal(found_QD, wanted_QD)


def test_the_weights_are_gate_above_up_and_then_down() -> None:
    experts = GroupedExperts(1, 4, 4, F.relu)
    with torch.no_grad():
        experts.gate_up_proj[0, :4] = 2 * torch.eye(4)
        experts.gate_up_proj[0, 4:] = 5 * torch.eye(4)
        experts.down_proj[0] = torch.eye(4).roll(1, dims=0)
    row = torch.tensor([[1.0, -1.0, 2.0, 0.0]])
    # relu(2x) * 5x, each value then moved one place on.
    assert experts(row, torch.ones(1), ends([1])).tolist() == [[0.0, 10.0, 0.0, 40.0]]


def test_no_rows_give_no_results_and_zero_gradients() -> None:
    for dtype in (torch.float32, torch.float64):
        experts = GroupedExperts(3, 8, 4, F.silu).to(dtype)
        rows_QD = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
        results_QD = experts(rows_QD, torch.zeros(0), ends([0, 0, 0]))
        assert results_QD.shape == (0, 8)
        results_QD.sum().backward()
        for parameter in experts.parameters():
            assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("activation", [F.silu, nn.SiLU(), F.gelu], ids=["silu", "SiLU", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_trap_T23_the_gate_equals_plain_operations_forward_and_backward(
    activation: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 17, generator=generator, dtype=torch.float64).to(dtype).double()
    probe_QF = torch.randn(7, 8, generator=generator, dtype=torch.float64)
    plain = [values[:, :16].clone().requires_grad_(), values[:, 16:].clone().requires_grad_()]
    gate_QF, up_QF = plain[0].chunk(2, dim=1)
    wanted_QF = (F.gelu if activation is F.gelu else F.silu)(gate_QF) * up_QF * plain[1]
    (wanted_QF * probe_QF).sum().backward()
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in plain]
    found_QF = gate(leaves[0], leaves[1], activation)
    (found_QF * probe_QF.to(dtype)).sum().backward()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    results = [found_QF, *(leaf.grad for leaf in leaves)]
    for found, wanted in zip(results, [wanted_QF, *(leaf.grad for leaf in plain)], strict=True):
        assert found is not None and found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_silu_is_recognized_in_every_form_and_nothing_else_is() -> None:
    assert all(map(is_silu, (F.silu, nn.SiLU(), ACT2FN["silu"], ACT2FN["swish"])))
    assert not any(map(is_silu, (F.gelu, nn.GELU(), ACT2FN["gelu"], torch.sigmoid)))


def slow_biased_experts(experts: BiasedExperts, rows_QD: Tensor, weights_Q: Tensor, counts: list[int]) -> Tensor:
    """The slow twin: one network after the other, as a dense model computes it."""
    results = []
    for index, part in enumerate(rows_QD[: sum(counts)].split(counts)):
        up = experts.activation(F.linear(part, experts.up_proj[index], experts.up_bias[index]))
        results.append(F.linear(up, experts.down_proj[index], experts.down_bias[index]))
    return torch.cat(results) * weights_Q[: sum(counts)].unsqueeze(1)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.sampled_from([0, 0, 1, 3, 7]), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_biased_experts_equal_one_network_after_the_other(counts: list[int], seed: int) -> None:
    """Values and every gradient, that of the gate weights too."""
    generator = torch.Generator().manual_seed(seed)
    experts = BiasedExperts(len(counts), 8, 12, ACT2FN["gelu"])
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    rows_QD, probe_QD = (torch.randn(sum(counts), 8, generator=generator) for _ in range(2))
    weights_Q = torch.rand(sum(counts), generator=generator)
    leaves = [rows_QD.requires_grad_(), weights_Q.requires_grad_(), *experts.parameters()]
    fast_QD = experts(rows_QD, weights_Q, ends(counts))
    slow_QD = slow_biased_experts(experts, rows_QD, weights_Q, counts)
    found = torch.autograd.grad((fast_QD * probe_QD).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((slow_QD * probe_QD).sum(), leaves)
    torch.testing.assert_close([fast_QD, *found], [slow_QD, *wanted], rtol=1e-4, atol=1e-4)


def test_trap_T27_rows_of_no_expert_do_not_reach_the_gradient_of_a_bias() -> None:
    """What they hold is unwritten memory: NaN here."""
    experts = BiasedExperts(2, 4, 4, F.gelu)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows_QD, weights_Q = torch.ones(5, 4), torch.ones(5)
    result_QD = experts(rows_QD, weights_Q, ends([1, 2]))
    gradient_QD = torch.ones(5, 4)
    gradient_QD[3:] = float("nan")
    found = torch.autograd.grad(result_QD, [experts.down_bias], gradient_QD)
    assert torch.equal(found[0], torch.tensor([[1.0], [2.0]]).expand(2, 4))
