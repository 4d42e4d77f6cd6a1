"""Dispatch on one rank: order of the rows, empty slots, and padding."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_moe.comm.mesh import Mesh
from dist_moe.moe.dispatch import combine, dispatch
from dist_moe.moe.kernels import TILE_ROWS
from tests.dist.layers import PADDED, on

ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)
IDS_TK = torch.tensor([[2, 0], [-1, -1], [0, 3], [2, 3]])
HIDDEN_TD = torch.arange(8.0).view(4, 2)


def test_rows_are_sorted_by_expert_then_by_token() -> None:
    there = dispatch(HIDDEN_TD, IDS_TK, torch.arange(8.0).view(4, 2), 5, ALONE)
    assert there.ends_e.tolist() == [2, 2, 4, 6, 6]
    assert there.ends_e.dtype == torch.int32, "as grouped_mm takes it"
    token_of_row = [0, 2, 0, 3, 2, 3]
    assert torch.equal(there.rows_QD, HIDDEN_TD[token_of_row])
    assert there.weights_Q.tolist() == [1, 4, 0, 6, 5, 7]


def test_an_unrouted_token_gets_zero_and_no_gradient() -> None:
    hidden_TD = HIDDEN_TD.clone().requires_grad_()
    weights_TK = torch.tensor([[1.0, 2.0], [7.0, 7.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    there = dispatch(hidden_TD, IDS_TK, weights_TK, 5, ALONE)
    mixed_TD = combine(there.rows_QD * there.weights_Q.unsqueeze(1), there.handle, ALONE)
    assert torch.equal(mixed_TD, HIDDEN_TD * torch.tensor([3.0, 0.0, 7.0, 11.0]).unsqueeze(1))
    mixed_TD.sum().backward()
    assert hidden_TD.grad is not None and hidden_TD.grad[:, 0].tolist() == [3.0, 0.0, 7.0, 11.0]
    assert weights_TK.grad is not None and weights_TK.grad[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("padded", [False, True])
def test_trap_T23_the_gradient_of_a_gate_weight_is_that_of_its_row(padded: bool) -> None:
    hidden_TD = HIDDEN_TD.bfloat16()
    weights_TK = torch.arange(1.0, 9.0).bfloat16().view(4, 2).requires_grad_()
    with on(PADDED) if padded else contextlib.nullcontext():
        there = dispatch(hidden_TD, IDS_TK, weights_TK, 5, ALONE)
    combine(there.rows_QD * there.weights_Q.unsqueeze(1), there.handle, ALONE).sum().backward()
    taken_TK = (IDS_TK >= 0).bfloat16()
    assert weights_TK.grad is not None
    assert torch.equal(weights_TK.grad, taken_TK * hidden_TD.sum(dim=1, keepdim=True))
    assert weights_TK.grad.abs().sum() > 0


def test_trap_T27_rows_of_padding_have_weight_zero() -> None:
    hidden_TD = HIDDEN_TD.bfloat16()
    with on(PADDED):
        there = dispatch(hidden_TD, IDS_TK, torch.arange(1, 9).bfloat16().view(4, 2), 5, ALONE)
    assert there.ends_e.tolist() == [16, 16, 32, 48, 48] and len(there.rows_QD) == 3 * TILE_ROWS
    rows = [0, 1, 16, 17, 32, 33]
    assert torch.equal(there.rows_QD[rows], hidden_TD[[0, 2, 0, 3, 2, 3]])
    assert there.weights_Q.nonzero().squeeze(1).tolist() == rows
    assert there.weights_Q[rows].tolist() == [2, 5, 1, 7, 6, 8]
    results_QD = torch.full_like(there.rows_QD, float("nan"))
    results_QD[rows] = there.rows_QD[rows]
    mixed_TD = combine(results_QD, there.handle, ALONE)
    assert torch.equal(mixed_TD, hidden_TD * torch.tensor([[2], [0], [2], [2]])), "the results of padding are not read"


@pytest.mark.parametrize("top_k", [1, 3])
def test_no_token_passes_through(top_k: int) -> None:
    hidden_TD = torch.zeros(0, 4, requires_grad=True)
    there = dispatch(hidden_TD, torch.zeros(0, top_k, dtype=torch.int64), torch.zeros(0, top_k), 3, ALONE)
    assert there.ends_e.tolist() == [0, 0, 0]
    mixed_TD = combine(there.rows_QD, there.handle, ALONE)
    mixed_TD.sum().backward()
    assert mixed_TD.shape == (0, 4) and hidden_TD.grad is not None


def test_a_token_may_take_the_same_expert_twice() -> None:
    there = dispatch(HIDDEN_TD, torch.tensor([[1, 1]]).expand(4, 2), torch.ones(4, 2), 2, ALONE)
    assert there.ends_e.tolist() == [0, 8]
    assert torch.equal(combine(there.rows_QD, there.handle, ALONE), 2 * HIDDEN_TD)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_one_token_with_many_experts_does_not_pad_the_others() -> None:
    """200 tokens with one expert and one with 64: rows for 264 assignments, not for 201 x 64."""
    ids_TK = torch.full((201, 64), -1)
    ids_TK[:, 0] = torch.arange(201) % 64
    ids_TK[100] = torch.arange(64)
    hidden_TD = torch.randn(201, 48, requires_grad=True)
    weights_TK = torch.rand(201, 64)
    with Largest() as largest:
        dispatched = dispatch(hidden_TD, ids_TK, weights_TK, 64, ALONE)
        combine(dispatched.rows_QD, dispatched.handle, ALONE).sum().backward()
    assert largest.numel <= max(264 * 48, ids_TK.numel())
