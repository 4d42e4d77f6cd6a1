"""Several tensors in one all-to-all: where a message costs more than its bytes, as between hosts, one is enough.

How many rows come is not known before, and a message that told it would take as long as one with rows. So the first
message to each rank has a fixed size, the numbers of rows at its head and as much of the rows as it holds; a second
one takes the rest, if any rank has a rest for any other. That is known to all: each tells every other its longest.

Shapes: P ranks in the group, N tensors; the first dim of each tensor counts its rows.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Splits = Sequence[Sequence[int]]  # [tensor][rank] rows

FIRST_BYTES = 1 << 14
"""Of the first message to a rank, filled up if need be: about what TCP sends at once after a rest (RFC 6928)."""
NUMBER_BYTES = torch.int64.itemsize


def exchange_packed(
    tensors: Sequence[Tensor], send: Splits, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, ...], list[list[int]]]:
    """Send consecutive blocks of rows of every tensor, send[i][p] of tensor i to rank p -> what arrives of each.

    The second result says, as `send`, how many rows of each came from each rank. The gradients of the tensors that have
    one travel back the same way, in one message. Every rank of the group has to call this, forward and backward, with
    tensors of the same dtypes and widths.
    """
    *arrived, received_NP = _ExchangePacked.apply(group, [list(one) for one in send], *tensors)
    return tuple(arrived), received_NP.tolist()


class _ExchangePacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, send: list[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        packed, receive = _exchange_unknown(_pack(tensors, send, group), send, _widths(tensors), group)
        ctx.group, ctx.send, ctx.receive = group, send, receive
        ctx.floats = [number for number, tensor in enumerate(tensors) if tensor.is_floating_point()]
        arrived = _unpack(packed, receive, tensors)
        received_NP = torch.tensor(receive)
        ctx.mark_non_differentiable(received_NP, *(one for one in arrived if not one.is_floating_point()))
        return *arrived, received_NP

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors, send, receive = (
            [of_all[number] for number in ctx.floats] for of_all in (gradients, ctx.receive, ctx.send)
        )
        sizes = _part_bytes(receive, _widths(tensors))
        packed = _all_to_all(_pack(tensors, send, ctx.group), sizes, ctx.group)
        found = dict(zip(ctx.floats, _unpack(packed, receive, tensors), strict=True))
        return None, None, *(found.get(number) for number in range(len(ctx.send)))


def _exchange_unknown(
    parts: list[Tensor], send: Splits, widths: list[int], group: dist.ProcessGroup
) -> tuple[list[Tensor], list[list[int]]]:
    """Part p goes to rank p -> the part that came from each rank, and the rows of each tensor in it."""
    longest = max(len(part) for part in parts)
    heads = torch.tensor([[*rows, longest] for rows in zip(*send, strict=True)]).to(parts[0].device)
    head_bytes = heads.shape[1] * NUMBER_BYTES
    room = max(FIRST_BYTES - head_bytes, 0)
    first = parts[0].new_zeros(len(parts), head_bytes + room)
    first[:, :head_bytes] = heads.view(torch.uint8)
    for block, part in zip(first[:, head_bytes:], parts, strict=True):
        block[: len(part)] = part[:room]
    came = torch.empty_like(first)
    dist.all_to_all_single(came, first, group=group)
    told = came[:, :head_bytes].contiguous().view(torch.int64).tolist()
    receive = [list(of_tensor) for of_tensor in zip(*(rows for *rows, _ in told), strict=True)]
    sizes = _part_bytes(receive, widths)
    begun = [block[:size] for block, size in zip(came[:, head_bytes:], sizes, strict=True)]
    if max(head[-1] for head in told) <= room:
        return begun, receive
    rest = _all_to_all([part[room:] for part in parts], [max(size - room, 0) for size in sizes], group)
    return [torch.cat(pair) for pair in zip(begun, rest, strict=True)], receive


def _all_to_all(parts: list[Tensor], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Bytes: parts[p] to rank p -> sizes[p] from each."""
    packed = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(packed, torch.cat(parts), sizes, [len(part) for part in parts], group=group)
    return list(packed.split(sizes))


def _pack(tensors: Sequence[Tensor], send: Splits, group: dist.ProcessGroup) -> list[Tensor]:
    """For each rank the bytes of its rows of all tensors."""
    blocks = [one.contiguous().split(list(rows)) for one, rows in zip(tensors, send, strict=True)]
    return [torch.cat([_as_bytes(of_tensor[rank]) for of_tensor in blocks]) for rank in range(group.size())]


def _unpack(parts: list[Tensor], receive: Splits, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_pack` on what came; each tensor has the dtype and row of the one in its place in `like`."""
    widths = _widths(like)
    pieces = [
        part.split([rows[rank] * width for rows, width in zip(receive, widths, strict=True)])
        for rank, part in enumerate(parts)
    ]
    return [
        torch.cat([of_rank[number] for of_rank in pieces]).view(one.dtype).view(-1, *one.shape[1:])
        for number, one in enumerate(like)
    ]


def _part_bytes(rows: Splits, widths: list[int]) -> list[int]:
    return [sum(map(math.prod, zip(of_rank, widths, strict=True))) for of_rank in zip(*rows, strict=True)]


def _widths(tensors: Sequence[Tensor]) -> list[int]:
    """Bytes of a row of each."""
    return [math.prod(one.shape[1:]) * one.element_size() for one in tensors]


def _as_bytes(block: Tensor) -> Tensor:
    return block.reshape(-1).view(torch.uint8)
