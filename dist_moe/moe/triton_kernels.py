"""The steps of an MoE layer between its matmuls on a GPU, one Triton kernel each, where PyTorch takes several passes.

`number_rows` and `place_rows` equal their counterparts in PyTorch exactly, `gather_sum` and `SwiGLU` to rounding: they
compute in fp32 and add in a fixed order, and leave fp64 to PyTorch. None waits for the device.

Shapes: T tokens, K slots a token, N = T * K slots, Q rows, D width, F expert width, E experts, e local ones, P ranks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.moe import row_order, swiglu
from dist_moe.moe.gather_sum import by_gather
from dist_moe.moe.row_order import Placement, SlotOrder

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
        if gate_up_QF.dtype == torch.float64:
            return swiglu.SwiGLU.forward(ctx, gate_up_QF, weights_Q1)
        gate_up_QF, weights_Q1 = gate_up_QF.contiguous(), weights_Q1.contiguous()
        ctx.save_for_backward(gate_up_QF, weights_Q1)
        rows, width = gate_up_QF.shape[0], gate_up_QF.shape[1] // 2
        result_QF = gate_up_QF.new_empty(rows, width)
        if result_QF.numel():
            block = min(BLOCK, triton.next_power_of_2(width))
            _swiglu[(rows, triton.cdiv(width, block))](gate_up_QF, weights_Q1, result_QF, width, BLOCK=block)
        return result_QF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """[Q, F] -> [Q, 2F] and [Q, 1]."""
        gate_up_QF, weights_Q1 = ctx.saved_tensors
        if gate_up_QF.dtype == torch.float64:
            return swiglu.SwiGLU.backward(ctx, *gradients)
        rows, width = gate_up_QF.shape[0], gate_up_QF.shape[1] // 2
        gradient_QF, weights_gradient_Q1 = torch.empty_like(gate_up_QF), torch.zeros_like(weights_Q1)
        if gradient_QF.numel():
            block = min(BLOCK, triton.next_power_of_2(width))
            _swiglu_backward[(rows,)](
                gradients[0].contiguous(), gate_up_QF, weights_Q1, gradient_QF, weights_gradient_Q1, width, BLOCK=block
            )
        return gradient_QF, weights_gradient_Q1


def number_rows(sorted_N: Tensor, slot_N: Tensor, experts: int, columns: int) -> SlotOrder:
    """Number the sorted rows (`row_order.number_rows`)."""
    slots = len(slot_N)
    token_R, row_N = torch.empty_like(slot_N), torch.empty_like(slot_N)
    ends_E, counts_E = slot_N.new_empty(experts), slot_N.new_empty(experts)
    programs = triton.cdiv(slots, BLOCK) + triton.cdiv(experts, BLOCK)
    _number_rows[(programs,)](
        *(sorted_N, slot_N, token_R, row_N, ends_E, counts_E),
        *(slots, columns, experts, slots.bit_length()),
        BLOCK=BLOCK,
    )
    return SlotOrder(token_R, row_N, ends_E, counts_E)


def place_rows(counts_Pe: Tensor, rows: int, tile: int) -> Placement:
    """Place received rows in the order of experts (`row_order.place_rows`)."""
    if tile > 1:
        return row_order.place_rows(counts_Pe, rows, tile)
    senders, local = counts_Pe.shape
    place_R, source_Q = counts_Pe.new_empty(rows), counts_Pe.new_empty(rows)
    ends_e = counts_Pe.new_empty(local, dtype=torch.int32)
    blocks = senders * local
    _place_rows[(blocks,)](
        *(counts_Pe.contiguous(), place_R, source_Q, ends_e, senders, local),
        ALL=triton.next_power_of_2(blocks),
        BLOCK=BLOCK,
    )
    return Placement(place_R, source_Q, None, ends_e)


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


@triton.jit
def _number_rows(sorted_, slot, token, row, ends, counts, slots, columns, experts, steps, BLOCK: tl.constexpr):
    """One program numbers a block of rows, or counts those of a block of experts."""
    program = tl.program_id(0)
    row_programs = tl.cdiv(slots, BLOCK)
    if program < row_programs:
        index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < slots
        own = tl.load(slot + index, mask=inside, other=0)
        expert = tl.load(sorted_ + index, mask=inside, other=0)
        tl.store(token + index, own // columns, mask=inside)
        tl.store(row + own, tl.where(expert < experts, index, -1), mask=inside)
    else:
        expert = (program - row_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = expert < experts
        start = _count_below(sorted_, expert, slots, steps)
        end = _count_below(sorted_, expert + 1, slots, steps)
        tl.store(ends + expert, end, mask=inside)
        tl.store(counts + expert, end - start, mask=inside)


@triton.jit
def _count_below(sorted_, bound, length, steps):
    """How many of the sorted values are below each bound, by halving the range in which the answer lies."""
    low, high = bound * 0, bound * 0 + length
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(sorted_ + middle, mask=open_, other=0) < bound
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit
def _place_rows(counts, place, source, ends, senders, local, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """One program places the rows of one block (sender, expert)."""
    block = tl.program_id(0)
    sender, expert = block // local, block % local
    other = tl.arange(0, ALL)
    other_sender, other_expert = other // local, other % local
    rows = tl.load(counts + other, mask=other < senders * local, other=0)
    count = tl.sum(tl.where(other == block, rows, 0), axis=0)
    from_ = tl.sum(tl.where(other < block, rows, 0), axis=0)
    is_before = (other_expert < expert) | ((other_expert == expert) & (other_sender < sender))
    to = tl.sum(tl.where(is_before, rows, 0), axis=0)
    if sender == senders - 1:
        tl.store(ends + expert, (to + count).to(tl.int32))
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        tl.store(place + from_ + index, to + index, mask=inside)
        tl.store(source + to + index, from_ + index, mask=inside)
