"""The differentiable all-to-all: rows go to the ranks that hold their experts, and their gradients come back.

Shapes: R rows sent, Q rows received, D width, P ranks in the group, N counts for each rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_counts(counts_PN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange counts; a collective call without gradient.

    Args:
        counts_PN: int64; row p goes to rank p of the group.
        group: The process group.

    Returns:
        int64 of the same shape; row p came from rank p.
    """
    received_PN = torch.empty_like(counts_PN)
    dist.all_to_all_single(received_PN, counts_PN.contiguous(), group=group)
    return received_PN


def exchange_rows(rows_RD: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Exchange consecutive blocks of rows; any block may be empty, in both directions, even all of them.

    The gradient takes the opposite way. Every rank of the group has to call this, forward and backward, in the same
    order.

    Args:
        rows_RD: The rows to send, ordered by receiving rank.
        send: send[p] rows go to rank p.
        receive: receive[p] rows come from rank p.
        group: The process group.

    Returns:
        rows_QD, ordered by sending rank.
    """
    return _ExchangeRows.apply(rows_RD, list(send), list(receive), group)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows_RD, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received_QD = rows_RD.new_empty(sum(receive), rows_RD.shape[1])
    dist.all_to_all_single(received_QD, rows_RD.contiguous(), receive, send, group=group)
    return received_QD
