"""Dispatch and combine: sort by expert, exchange counts, exchange rows, and the reverse.

How a row is sent, with P ranks in the expert-parallel group:
1. A token that takes K experts has K slots. Slots are sorted by expert, so that the rows for one rank are contiguous.
2. The ranks exchange how many rows they send for each expert (int64), and then the rows.
3. Received rows are ordered by sender, then by expert; one permutation orders them by expert for the grouped matmul.
4. The inverse permutation and the inverse exchange return each result to the rank and slot it came from, where the
   results of each token's slots are weighted and summed.

Nothing is dropped. Shapes: T tokens, D width, K slots a token, R rows sent, Q rows received, E experts, e local ones.
"""

from typing import Any

import torch
from torch import Tensor

from dist_moe.comm.exchange import exchange_counts, exchange_rows
from dist_moe.comm.mesh import Mesh
from dist_moe.moe.records import Dispatched, DispatchHandle


def dispatch(hidden_TD: Tensor, ids_TK: Tensor, experts: int, mesh: Mesh) -> Dispatched:
    """Send each token's row to the ranks that hold its experts. Collective over the expert-parallel group.

    With an expert-parallel size of 1 nothing is communicated.

    Args:
        hidden_TD: The tokens of this rank.
        ids_TK: int64 in [-1, experts); a slot with -1 (padding) is not sent.
        experts: E, over all ranks of `mesh`.
        mesh: The expert-parallel group.

    Returns:
        The rows for the experts of this rank, and the handle that `combine` needs.
    """
    slots_R, counts_E = _sort_slots(ids_TK, experts)
    rows_RD = take_rows(hidden_TD, slots_R, ids_TK.shape[1])
    if mesh.ep_group is None:
        return Dispatched(rows_RD, counts_E.cpu(), DispatchHandle(slots_R, None, [], []))
    local = experts // mesh.expert_parallel
    counts_Pe = counts_E.view(mesh.expert_parallel, local)
    arriving_Pe = exchange_counts(counts_Pe, mesh.ep_group).cpu()
    send, receive = counts_Pe.sum(1).tolist(), arriving_Pe.sum(1).tolist()
    arrived_QD = exchange_rows(rows_RD, send, receive, mesh.ep_group)
    order_Q = _order_by_expert(arriving_Pe).to(arrived_QD.device)
    rows_QD = _Permute.apply(arrived_QD, order_Q)
    return Dispatched(rows_QD, arriving_Pe.sum(0), DispatchHandle(slots_R, order_Q, send, receive))


def combine(results_QD: Tensor, weights_TK: Tensor, handle: DispatchHandle, mesh: Mesh) -> Tensor:
    """Return results to their tokens and sum them by gate weight. Collective, as `dispatch`.

    Args:
        results_QD: The experts' results, in the order of `Dispatched.rows_QD`.
        weights_TK: Gate weights of this rank's tokens.
        handle: `Dispatched.handle` of what `dispatch` returned.
        mesh: As of `dispatch`.

    Returns:
        [T, D], zeros for a token without rows.
    """
    if handle.expert_order_Q is not None and mesh.ep_group is not None:
        arrived_QD = _Permute.apply(results_QD, _invert(handle.expert_order_Q))
        results_QD = exchange_rows(arrived_QD, handle.receive, handle.send, mesh.ep_group)
    tokens, slots = weights_TK.shape
    weighted_RD = results_QD * weights_TK.reshape(-1).index_select(0, handle.slots_R).unsqueeze(-1)
    return sum_rows(weighted_RD, handle.slots_R, tokens, slots)


def take_rows(hidden_TD: Tensor, slots_R: Tensor, slots: int) -> Tensor:
    """Gather the row of each slot's token, where slot = token * `slots` + column (`slots`: K, slots per token).

    Returns:
        [R, D].
    """
    return _TakeRows.apply(hidden_TD, slots_R, slots)


def sum_rows(rows_RD: Tensor, slots_R: Tensor, tokens: int, slots: int) -> Tensor:
    """Sum the rows of each token, in the order of its slots.

    Returns:
        [T, D].
    """
    return _SumRows.apply(rows_RD, slots_R, tokens, slots)


def _sort_slots(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the occupied slots by expert (stable) -> slots_R, and the rows of each expert, int64."""
    ids = ids_TK.reshape(-1)
    occupied = (ids >= 0).nonzero().squeeze(1)
    order = torch.argsort(ids[occupied], stable=True)
    return occupied[order], torch.bincount(ids[occupied], minlength=experts)


def _order_by_expert(arriving_Pe: Tensor) -> Tensor:
    """The permutation of rows from the order (sender, expert) to (expert, sender), from their counts."""
    counts = arriving_Pe.reshape(-1)
    senders, local = arriving_Pe.shape
    expert_of_block = torch.arange(local).repeat(senders)
    return torch.argsort(expert_of_block.repeat_interleave(counts), stable=True)


def _invert(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def _sum_by_token(rows_RD: Tensor, slots_R: Tensor, tokens: int, slots: int) -> Tensor:
    """Sum the rows of each token, in the order of its slots, accumulated in fp32 or wider -> [T, D]."""
    # One addition per column, in which a token occurs at most once: so the order is fixed on a GPU too, and the cost
    # is proportional to the rows, for any number of columns.
    summed_TD = rows_RD.new_zeros(tokens, rows_RD.shape[1], dtype=torch.promote_types(torch.float32, rows_RD.dtype))
    slot_R = slots_R % slots
    rows_of_slot = torch.bincount(slot_R, minlength=slots).tolist()
    for part in torch.argsort(slot_R, stable=True).split(rows_of_slot):
        summed_TD.index_add_(0, slots_R[part] // slots, rows_RD[part].to(summed_TD.dtype))
    return summed_TD.to(rows_RD.dtype)


class _TakeRows(torch.autograd.Function):
    """rows = hidden[slot // K]; the gradient of a token is the sum over its slots in fixed order.

    PyTorch's own backward of this indexing adds rows atomically on a GPU, in an order that changes between runs.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, slots_R: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(slots_R)
        ctx.tokens, ctx.slots = hidden_TD.shape[0], slots
        return hidden_TD.index_select(0, slots_R // slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slots_R,) = ctx.saved_tensors
        return _sum_by_token(gradients[0], slots_R, ctx.tokens, ctx.slots), None, None


class _SumRows(torch.autograd.Function):
    """The transpose of `_TakeRows`: a sum over the slots of a token, whose gradient is copied to each of them."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, slots_R: Tensor, tokens: int, slots: int) -> Tensor:
        ctx.save_for_backward(slots_R)
        ctx.slots = slots
        return _sum_by_token(rows_RD, slots_R, tokens, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slots_R,) = ctx.saved_tensors
        return gradients[0].index_select(0, slots_R // ctx.slots), None, None, None


class _Permute(torch.autograd.Function):
    """rows[order] for a permutation, whose gradient is the inverse permutation rather than a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, order_Q: Tensor) -> Tensor:
        ctx.save_for_backward(order_Q)
        return rows_QD.index_select(0, order_Q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order_Q,) = ctx.saved_tensors
        return gradients[0].index_select(0, _invert(order_Q)), None
