"""Dispatch and combine: sort by expert, exchange counts, exchange rows, and the reverse.

How a row is sent, with P ranks in the expert-parallel group:
1. A token that takes K experts has K slots. Slots are sorted by expert, so that the rows for one rank are contiguous.
2. The ranks exchange how many rows they send for each expert (int64) while they gather the rows, and then the rows
   with their gate weights, while a shared expert is computed.
3. Received rows are ordered by sender, then by expert; one move orders them by expert for the grouped matmul.
4. The reverse move and the reverse exchange return each result to the rank and slot it came from, where the results of
   each token's slots are summed.

The experts multiply by the gate weights, between their two matmuls: there a row is often narrower, and no result has to
be kept for the gradient of its weight.

Nothing is dropped. Shapes: T tokens, D width, K slots a token, R rows sent, Q rows received (padding included), E
experts, e local ones, P ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_moe.comm.exchange import exchange_rows, start_exchange_counts, start_exchange_rows
from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.model import KernelsName
from dist_moe.moe.gather_sum import GatherSum
from dist_moe.moe.kernels import kernels_for
from dist_moe.moe.records import Dispatched, DispatchHandle, Exchanged
from dist_moe.moe.row_order import TokenRows, first_rows, move, sort_slots

MOST_SLOTS_UNREAD = 16
"""Where tokens have more slots than this (threshold routing), most are empty, and the host waits for a device to know
how many: that takes less time than a row for each slot."""


def dispatch(
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: int,
    mesh: Mesh,
    overlapped: Callable[[Tensor], object] | None = None,
    kernels: KernelsName = "auto",
) -> Dispatched:
    """Send each token's row to the ranks that hold its experts. Collective over the expert-parallel group.

    With an expert-parallel size of 1 nothing is communicated.

    Args:
        hidden_TD: The tokens of this rank.
        ids_TK: int64 in [-1, experts); a slot with -1 (padding) is not sent.
        weights_TK: The gate weights.
        experts: E, over all ranks of `mesh`.
        mesh: The expert-parallel group.
        overlapped: Called with hidden_TD during the exchange of the rows, if there is one. Its backward runs during
            the exchange of the gradients.
        kernels: The implementations on a GPU, as `model.moe_kernels` names them.

    Returns:
        The rows and gate weights for the experts of this rank, and the handle that `combine` needs.
    """
    chosen = kernels_for(hidden_TD.device, kernels)
    tile = chosen.tile(hidden_TD.dtype)
    remove_empty = chosen.waits or ids_TK.shape[1] > MOST_SLOTS_UNREAD
    rows, ends_E, counts_E = sort_slots(ids_TK, experts, chosen.number_rows, remove_empty=remove_empty)
    if mesh.ep_group is None:
        ends_e = ends_E.int()
        if tile > 1:
            placement = chosen.place_rows(counts_E.unsqueeze(0), len(rows.slot_R), tile)
            rows, ends_e = move(rows, placement), placement.ends_e
        return Dispatched(
            take_rows(hidden_TD, rows, kernels),
            _TakeWeights.apply(weights_TK, rows),
            ends_e,
            DispatchHandle(rows, None),
        )
    exchange = start_exchange_counts(counts_E.view(mesh.expert_parallel, -1), mesh.ep_group)
    rows_RD, weights_R = take_rows(hidden_TD, rows, kernels), weights_TK.reshape(-1).index_select(0, rows.slot_R)
    arriving_Pe, send, receive = exchange.finish()
    if sum(send) < len(rows_RD):  # the last ones are of empty slots
        rows, rows_RD, weights_R = first_rows(rows, sum(send)), rows_RD[: sum(send)], weights_R[: sum(send)]
    in_flight = start_exchange_rows([rows_RD, weights_R], send, receive, mesh.ep_group, mesh.buffers)
    placement = chosen.place_rows(arriving_Pe, sum(receive), tile)
    if overlapped is not None:
        overlapped(hidden_TD)
    arrived_QD, arrived_Q = in_flight.finish()
    rows_QD = _Move.apply(arrived_QD, placement.source_Q, placement.place_R)
    weights_Q = _Move.apply(arrived_Q, placement.source_Q, placement.place_R)
    if placement.padding is not None:
        weights_Q = weights_Q.index_fill(0, placement.padding, 0)
    return Dispatched(rows_QD, weights_Q, placement.ends_e, DispatchHandle(rows, Exchanged(placement, send, receive)))


def combine(results_QD: Tensor, handle: DispatchHandle, mesh: Mesh, kernels: KernelsName = "auto") -> Tensor:
    """Return results to their tokens and sum them. Collective, as `dispatch`.

    Args:
        results_QD: The experts' results times their gate weights, in the order of `Dispatched.rows_QD`.
        handle: `Dispatched.handle` of what `dispatch` returned.
        mesh: As of `dispatch`.
        kernels: As of `dispatch`.

    Returns:
        [T, D], zeros for a token without rows.
    """
    if handle.exchanged is not None and mesh.ep_group is not None:
        placement, send, receive = handle.exchanged
        arrived_QD = _Move.apply(results_QD, placement.place_R, placement.source_Q)
        (results_QD,) = exchange_rows([arrived_QD], receive, send, mesh.ep_group, mesh.buffers)
    return sum_rows(results_QD, handle.rows, kernels)


def take_rows(hidden_TD: Tensor, rows: TokenRows, kernels: KernelsName = "auto") -> Tensor:
    """Gather the row of each slot's token -> [R, D]."""
    return _TakeRows.apply(hidden_TD, rows, kernels_for(hidden_TD.device, kernels).gather_sum)


def sum_rows(rows_RD: Tensor, rows: TokenRows, kernels: KernelsName = "auto") -> Tensor:
    """Sum the rows of each token, in the order of its slots -> [T, D]."""
    return _SumRows.apply(rows_RD, rows, kernels_for(rows_RD.device, kernels).gather_sum)


class _TakeRows(torch.autograd.Function):
    """rows = hidden[token]; the gradient of a token is the sum over its slots."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, rows: TokenRows, gather_sum: GatherSum) -> Tensor:
        ctx.save_for_backward(rows.row_TK)
        ctx.gather_sum = gather_sum
        return hidden_TD.index_select(0, rows.token_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return ctx.gather_sum(gradients[0].contiguous(), row_TK), None, None


class _SumRows(torch.autograd.Function):
    """The transpose of `_TakeRows`: the sum of a token's rows, whose gradient is copied to each of them."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, rows: TokenRows, gather_sum: GatherSum) -> Tensor:
        ctx.save_for_backward(rows.token_R)
        return gather_sum(rows_RD, rows.row_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return gradients[0].index_select(0, token_R), None, None


class _TakeWeights(torch.autograd.Function):
    """The gate weight of each row, 0 for padding; the gradient of an empty slot is 0."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, rows: TokenRows) -> Tensor:
        ctx.save_for_backward(rows.row_TK)
        weights_R = weights_TK.reshape(-1).index_select(0, rows.slot_R)
        return weights_R if rows.padding is None else weights_R.index_fill_(0, rows.padding, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (row_TK,), (gradient_R,) = ctx.saved_tensors, gradients
        if not len(gradient_R):
            return gradient_R.new_zeros(row_TK.shape), None
        return gradient_R[row_TK.clamp_min(0)].masked_fill_(row_TK < 0, 0), None


class _Move(torch.autograd.Function):
    """rows[index], whose gradient is moved back by the inverse index rather than added to where it came from.

    A row that no index names is of padding. Its gradient is that of another row of its expert: its gate weight is 0,
    and so is all that it adds to the expert's gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows_QD.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None
