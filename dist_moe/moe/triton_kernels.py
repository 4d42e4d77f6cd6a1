"""The steps of an MoE layer between its matmuls on a GPU, one Triton kernel each, where PyTorch takes several passes.

Each is equal to its counterpart in PyTorch (`gather_sum.by_gather`, `swiglu.SwiGLU`) to rounding, computes in fp32,
adds in a fixed order, and waits for nothing. Shapes: T tokens, K slots a token, Q rows, D width, F expert width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_moe.moe.gather_sum import by_gather

BLOCK = 1024
"""Most elements of a row that one program holds at a time."""


def gather_sum(rows_QD: Tensor, row_TK: Tensor) -> Tensor:
    """Sum each token's rows (`gather_sum.GatherSum`)."""
    if rows_QD.dtype == torch.float64:
        return by_gather(rows_QD, row_TK)
    (tokens, slots), width = row_TK.shape, rows_QD.shape[1]
    total_TD = rows_QD.new_empty(tokens, width)
    if total_TD.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        _gather_sum[(tokens, triton.cdiv(width, block))](
            rows_QD.contiguous(), row_TK.contiguous(), total_TD, width, SLOTS=slots, BLOCK=block
        )
    return total_TD


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight (`swiglu.Gate`)."""

    @staticmethod
    def forward(ctx: Any, gate_up_QF: Tensor, weights_Q1: Tensor) -> Tensor:
        """[Q, 2F] and [Q, 1] -> [Q, F]."""
        gate_up_QF, weights_Q1 = gate_up_QF.contiguous(), weights_Q1.contiguous()
        ctx.save_for_backward(gate_up_QF, weights_Q1)
        rows, width = gate_up_QF.shape[0], gate_up_QF.shape[1] // 2
        result_QF = gate_up_QF.new_empty(rows, width)
        if result_QF.numel():
            block = min(BLOCK, triton.next_power_of_2(width))
            _swiglu[(rows, triton.cdiv(width, block))](gate_up_QF, weights_Q1, result_QF, width, BLOCK=block)
        return result_QF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """[Q, F] -> [Q, 2F] and [Q, 1]."""
        gate_up_QF, weights_Q1 = ctx.saved_tensors
        rows, width = gate_up_QF.shape[0], gate_up_QF.shape[1] // 2
        gradient_QF, weights_gradient_Q1 = torch.empty_like(gate_up_QF), torch.zeros_like(weights_Q1)
        if gradient_QF.numel():
            block = min(BLOCK, triton.next_power_of_2(width))
            _swiglu_backward[(rows,)](
                gradients[0].contiguous(), gate_up_QF, weights_Q1, gradient_QF, weights_gradient_Q1, width, BLOCK=block
            )
        return gradient_QF, weights_gradient_Q1


@triton.jit
def _gather_sum(rows, row_of_slot, total, width, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program sums a block of columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    sum_ = tl.zeros([BLOCK], dtype=tl.float32)
    for slot in range(SLOTS):
        row = tl.load(row_of_slot + token * SLOTS + slot) + tl.zeros([BLOCK], dtype=tl.int64)
        sum_ += tl.load(rows + row * width + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
    tl.store(total + token * width + column, sum_.to(total.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(gate_up, weights, result, width, BLOCK: tl.constexpr):
    """One program computes a block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight
    tl.store(result + row * width + column, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gradient, gate_up, weights, of_gate_up, of_weights, width, BLOCK: tl.constexpr):
    """One program computes the gradients of one row: of gate and up, and of its weight, a sum over the columns."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    of_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        of_result = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        of_weight += of_result * silu * up
        of_up = of_result * weight * silu
        of_gate = of_result * weight * up * (sigmoid + silu * (1 - sigmoid))
        target = of_gate_up + row * 2 * width + column
        tl.store(target, of_gate.to(of_gate_up.dtype.element_ty), mask=inside)
        tl.store(target + width, of_up.to(of_gate_up.dtype.element_ty), mask=inside)
    tl.store(of_weights + row, tl.sum(of_weight, axis=0).to(of_weights.dtype.element_ty))
