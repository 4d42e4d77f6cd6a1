"""The sum of each token's rows: the combine of an MoE layer, and the backward of its dispatch.

The terms of a token are added in the order of its slots, in fp32 or wider, so that the sum is the same in every run and
on every layout. Adding rows to their tokens instead (`index_add_`) is atomic on a GPU, in an order that changes.

Shapes: T tokens, K slots a token, Q rows, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = -1
"""In `row_TK`: the slot has no row."""

GatherSum = Callable[[Tensor, Tensor], Tensor]
"""(rows_QD, row_TK) -> the sum over k of rows_QD[row_TK[:, k]], [T, D] in the dtype of the rows, without gradient.

row_TK is int64. Rows that no slot names are not read, and may be uninitialized. A token without rows gets zeros."""


def by_embedding_bag(rows_QD: Tensor, row_TK: Tensor) -> Tensor:
    """One pass over the rows, by PyTorch's kernel for sums of embeddings (`GatherSum`).

    The kernel has no empty slots. They are removed first, which waits for the device.
    """
    if not rows_QD.shape[0] or not row_TK.shape[0]:
        return rows_QD.new_zeros(row_TK.shape[0], rows_QD.shape[1])
    filled_TK = row_TK >= 0
    ends_T = filled_TK.sum(dim=1).cumsum(0)
    row_A = row_TK.reshape(-1) if int(ends_T[-1]) == row_TK.numel() else row_TK[filled_TK]
    return F.embedding_bag(row_A, rows_QD, F.pad(ends_T[:-1], (1, 0)), mode="sum")


def by_gather(rows_QD: Tensor, row_TK: Tensor) -> Tensor:
    """Gather all slots' rows, then sum them: on any device, without waiting for it, and with T * K more rows in memory.

    See `GatherSum`.
    """
    tokens, slots = row_TK.shape
    if not rows_QD.shape[0]:
        return rows_QD.new_zeros(tokens, rows_QD.shape[1])
    gathered_ND = rows_QD.index_select(0, row_TK.clamp_min(0).reshape(-1))
    gathered_TKD = gathered_ND.view(tokens, slots, rows_QD.shape[1]).masked_fill_(row_TK.unsqueeze(2) < 0, 0)
    return gathered_TKD.sum(dim=1, dtype=torch.promote_types(torch.float32, rows_QD.dtype)).to(rows_QD.dtype)
