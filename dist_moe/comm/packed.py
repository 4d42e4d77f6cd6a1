"""Several tensors in one all-to-all: where a message costs more than its bytes, as between hosts, one is enough.

Shapes: P ranks in the group; the first dim of each tensor counts its rows.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Splits = Sequence[Sequence[int]]  # [tensor][rank] rows


def exchange_packed(
    tensors: Sequence[Tensor], send: Splits, receive: Splits, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Send consecutive blocks of rows of every tensor, send[i][p] of tensor i to rank p -> what arrives of each.

    The gradients of those that have one travel back the same way, again in one message. Every rank of the group has to
    call this, forward and backward, with tensors of the same dtypes and widths.
    """
    return _ExchangePacked.apply(group, [list(one) for one in send], [list(one) for one in receive], *tensors)


class _ExchangePacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, send: list[list[int]], receive: list[list[int]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        ctx.floats = [number for number, tensor in enumerate(tensors) if tensor.is_floating_point()]
        arrived = _all_to_all(tensors, send, receive, group)
        ctx.mark_non_differentiable(*(one for one in arrived if not one.is_floating_point()))
        return tuple(arrived)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        back = _all_to_all(
            [gradients[number] for number in ctx.floats],
            [ctx.receive[number] for number in ctx.floats],
            [ctx.send[number] for number in ctx.floats],
            ctx.group,
        )
        found = dict(zip(ctx.floats, back, strict=True))
        return None, None, None, *(found.get(number) for number in range(len(ctx.send)))


def _all_to_all(tensors: Sequence[Tensor], send: Splits, receive: Splits, group: dist.ProcessGroup) -> list[Tensor]:
    ranks = range(group.size())
    blocks = [one.contiguous().split(list(rows)) for one, rows in zip(tensors, send, strict=True)]
    parts = [torch.cat([_as_bytes(of_tensor[rank]) for of_tensor in blocks]) for rank in ranks]
    widths = [math.prod(one.shape[1:]) * one.element_size() for one in tensors]
    arriving = [[rows[rank] * width for rows, width in zip(receive, widths, strict=True)] for rank in ranks]
    packed = tensors[0].new_empty(sum(map(sum, arriving)), dtype=torch.uint8)
    dist.all_to_all_single(
        packed, torch.cat(parts), [sum(sizes) for sizes in arriving], [len(part) for part in parts], group=group
    )
    pieces = packed.split([size for sizes in arriving for size in sizes])
    count = len(tensors)
    return [
        torch.cat(pieces[number::count]).view(one.dtype).view(-1, *one.shape[1:]) for number, one in enumerate(tensors)
    ]


def _as_bytes(block: Tensor) -> Tensor:
    return block.reshape(-1).view(torch.uint8)
