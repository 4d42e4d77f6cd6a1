"""The order of rows by expert, as indices: which row is where, before and after the exchange.

Shapes: T tokens, K slots a token, N = T * K slots, E experts, R rows before a move and Q after it, P ranks that send
rows, e local experts, B = P * e blocks of rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.moe.gather_sum import EMPTY


class TokenRows(NamedTuple):
    """Which slot each row is of, and which row each slot has.

    Attributes:
        slot_R: int64, the slot of each row; for padding, that of another row of the same expert.
        token_R: int64, the token of that slot.
        row_TK: int64, the row of each slot, or EMPTY.
        padding: int64, the rows that are of no slot; None without padding.
    """

    slot_R: Tensor
    token_R: Tensor
    row_TK: Tensor
    padding: Tensor | None = None


class Placement(NamedTuple):
    """A move of rows from the order (sender, expert) to the order (expert, sender).

    Attributes:
        place_R: int64, where each row goes.
        source_Q: int64, which row each place gets; for padding, the last row of the same expert.
        padding: int64, the places that are of no row; None without padding.
        ends_e: int32, the end of each expert's places, padding included.
    """

    place_R: Tensor
    source_Q: Tensor
    padding: Tensor | None
    ends_e: Tensor


class SlotOrder(NamedTuple):
    """The order of slots by expert.

    Attributes:
        token_R: int64, the token of each row.
        row_N: int64, the row of each slot, or EMPTY.
        ends_E: int64, the end of each expert's rows.
        counts_E: int64, the number of each expert's rows.
    """

    token_R: Tensor
    row_N: Tensor
    ends_E: Tensor
    counts_E: Tensor


NumberRows = Callable[[Tensor, Tensor, int, int], SlotOrder]
"""(sorted_N, slot_N, experts, K) -> `SlotOrder`, from the sorted ids of all slots, where those of empty slots are above
all experts', and the slot of each."""

PlaceRows = Callable[[Tensor, int, int], Placement]
"""(counts_Pe, rows, tile) -> `Placement`, as `place_rows`."""


def sort_slots(
    ids_TK: Tensor, experts: int, number_rows: NumberRows, *, remove_empty: bool
) -> tuple[TokenRows, Tensor, Tensor]:
    """Order the slots by expert (stable).

    Args:
        ids_TK: int64 in [-1, experts); -1 is an empty slot.
        experts: E.
        number_rows: How the rows are numbered after the sort.
        remove_empty: Make no rows for empty slots, which waits for the device; else their rows are the last ones.

    Returns:
        The rows in this order, and ends_E and counts_E of `SlotOrder`.
    """
    # Without its sign bit, -1 is the highest id.
    sorted_N, slot_R = (ids_TK & torch.iinfo(torch.int64).max).reshape(-1).sort(stable=True)
    token_R, row_N, ends_E, counts_E = number_rows(sorted_N, slot_R, experts, ids_TK.shape[1])
    rows = TokenRows(slot_R, token_R, row_N.view_as(ids_TK))
    return first_rows(rows, int(ends_E[-1])) if remove_empty else rows, ends_E, counts_E


def number_rows(sorted_N: Tensor, slot_N: Tensor, experts: int, columns: int) -> SlotOrder:
    """Number the rows by operators of PyTorch (`NumberRows`)."""
    # Not by bincount, which waits for the device to know the size of its result.
    starts_E = torch.searchsorted(sorted_N, torch.arange(experts + 1, device=sorted_N.device))
    row_N = torch.empty_like(slot_N)
    row_N[slot_N] = torch.arange(slot_N.shape[0], device=slot_N.device).masked_fill_(sorted_N >= experts, EMPTY)
    return SlotOrder(slot_N // columns, row_N, starts_E[1:], starts_E.diff())


def place_rows(counts_Pe: Tensor, rows: int, tile: int) -> Placement:
    """Place rows that are ordered by sender, then by expert, in the order of experts, by operators of PyTorch.

    Args:
        counts_Pe: int64, rows of each sender for each local expert.
        rows: R, their sum.
        tile: Pad each expert's places to a multiple of this, which waits for the device; 1 for no padding.
    """
    senders, local = counts_Pe.shape
    # The end of each block (sender, expert) in the order of experts, minus that in the order of senders, is how far its
    # rows move.
    ends_Pe = counts_Pe.t().reshape(-1).cumsum(0).view(local, senders).t()
    counts_B = counts_Pe.reshape(-1)
    if tile > 1:
        padding_e = -counts_Pe.sum(0) % tile
        ends_Pe = ends_Pe + padding_e.cumsum(0) - padding_e
    shift_B = ends_Pe.reshape(-1) - counts_B.cumsum(0)
    row_R = torch.arange(rows, device=counts_Pe.device)
    place_R = row_R + shift_B.repeat_interleave(counts_B, output_size=rows)
    if tile == 1:
        source_Q = torch.empty_like(row_R)
        source_Q[place_R] = row_R
        return Placement(place_R, source_Q, None, ends_Pe[-1].int())
    ends_e = ends_Pe[-1] + padding_e
    source_Q = torch.full((int(ends_e[-1]),), EMPTY, device=counts_Pe.device)
    source_Q[place_R] = row_R
    padding = (source_Q < 0).nonzero().squeeze(1)
    # Of no other expert, whose rows may not be finite: 0 times infinity is not 0.
    source_Q[padding] = source_Q[(ends_Pe[-1] - 1).repeat_interleave(padding_e)]
    return Placement(place_R, source_Q, padding, ends_e.int())


def move(rows: TokenRows, placement: Placement) -> TokenRows:
    """Return what `rows` are after a move."""
    if not len(rows.slot_R):
        return rows
    row_TK = placement.place_R[rows.row_TK.clamp_min(0)].masked_fill_(rows.row_TK < 0, EMPTY)
    source_Q = placement.source_Q
    return TokenRows(rows.slot_R[source_Q], rows.token_R[source_Q], row_TK, placement.padding)


def first_rows(rows: TokenRows, count: int) -> TokenRows:
    """Return the first `count` rows, where the others are of no slot."""
    return rows._replace(slot_R=rows.slot_R[:count], token_R=rows.token_R[:count])
