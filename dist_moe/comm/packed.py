"""Several tensors in one all-to-all, for networks on which a message costs more than its bytes, as between hosts.

The number of rows to receive is not known in advance, and a message with it would take as long as one with the rows.
So the first message to each rank has a fixed size: the numbers of rows in its header, and as many of the rows as fit.
A second message has the rest, if any rank has a rest for any other. All ranks know whether there is one, since each
header has the size of its sender's largest part.

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
"""Size of the first message to a rank, padded: about what TCP sends at once after an idle period (RFC 6928)."""
NUMBER_BYTES = torch.int64.itemsize


def exchange_packed(
    tensors: Sequence[Tensor], send: Splits, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, ...], list[list[int]]]:
    """Exchange consecutive blocks of rows of several tensors.

    The gradients of the floating-point tensors take the opposite way, in one message. Every rank of the group has to
    call this, forward and backward, with tensors of the same dtypes and widths.

    Args:
        tensors: The rows to send, each tensor ordered by receiving rank.
        send: send[i][p] rows of tensor i go to rank p.
        group: The process group.

    Returns:
        The rows received of each tensor, ordered by sending rank, and the numbers of them: [i][p] came from rank p.
    """
    *received, received_NP = _ExchangePacked.apply(group, [list(rows) for rows in send], *tensors)
    return tuple(received), received_NP.tolist()


class _ExchangePacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, send: list[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        packed, receive = _exchange_unknown(_pack(tensors, send, group), send, _row_bytes(tensors), group)
        ctx.group, ctx.send, ctx.receive = group, send, receive
        ctx.floats = [index for index, tensor in enumerate(tensors) if tensor.is_floating_point()]
        received = _unpack(packed, receive, tensors)
        received_NP = torch.tensor(receive)
        ctx.mark_non_differentiable(received_NP, *(one for one in received if not one.is_floating_point()))
        return *received, received_NP

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors, send, receive = (
            [of_all[index] for index in ctx.floats] for of_all in (gradients, ctx.receive, ctx.send)
        )
        sizes = _part_bytes(receive, _row_bytes(tensors))
        packed = _all_to_all(_pack(tensors, send, ctx.group), sizes, ctx.group)
        by_index = dict(zip(ctx.floats, _unpack(packed, receive, tensors), strict=True))
        return None, None, *(by_index.get(index) for index in range(len(ctx.send)))


def _exchange_unknown(
    parts: list[Tensor], send: Splits, row_bytes: list[int], group: dist.ProcessGroup
) -> tuple[list[Tensor], list[list[int]]]:
    """Exchange byte tensors of sizes that the receivers do not know.

    Args:
        parts: parts[p] goes to rank p.
        send: As in `exchange_packed`.
        row_bytes: Bytes of a row of each tensor.
        group: The process group.

    Returns:
        The part received from each rank, and the rows of each tensor in it: [tensor][rank].
    """
    longest = max(len(part) for part in parts)
    headers = torch.tensor([[*rows, longest] for rows in zip(*send, strict=True)]).to(parts[0].device)
    header_bytes = headers.shape[1] * NUMBER_BYTES
    capacity = max(FIRST_BYTES - header_bytes, 0)
    first = parts[0].new_zeros(len(parts), header_bytes + capacity)
    first[:, :header_bytes] = headers.view(torch.uint8)
    for block, part in zip(first[:, header_bytes:], parts, strict=True):
        block[: len(part)] = part[:capacity]
    received = torch.empty_like(first)
    dist.all_to_all_single(received, first, group=group)
    received_headers = received[:, :header_bytes].contiguous().view(torch.int64).tolist()
    receive = [list(of_tensor) for of_tensor in zip(*(rows for *rows, _ in received_headers), strict=True)]
    sizes = _part_bytes(receive, row_bytes)
    heads = [block[:size] for block, size in zip(received[:, header_bytes:], sizes, strict=True)]
    if max(header[-1] for header in received_headers) <= capacity:
        return heads, receive
    rests = _all_to_all([part[capacity:] for part in parts], [max(size - capacity, 0) for size in sizes], group)
    return [torch.cat(pair) for pair in zip(heads, rests, strict=True)], receive


def _all_to_all(parts: list[Tensor], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Send the bytes parts[p] to rank p, and return sizes[p] bytes from each rank p."""
    packed = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(packed, torch.cat(parts), sizes, [len(part) for part in parts], group=group)
    return list(packed.split(sizes))


def _pack(tensors: Sequence[Tensor], send: Splits, group: dist.ProcessGroup) -> list[Tensor]:
    """Return, for each rank, the bytes of its rows of all tensors."""
    blocks = [tensor.contiguous().split(list(rows)) for tensor, rows in zip(tensors, send, strict=True)]
    return [torch.cat([_as_bytes(of_tensor[rank]) for of_tensor in blocks]) for rank in range(group.size())]


def _unpack(parts: list[Tensor], receive: Splits, like: Sequence[Tensor]) -> list[Tensor]:
    """Invert `_pack`; each result has the dtype and row shape of the tensor at its index in `like`."""
    row_bytes = _row_bytes(like)
    pieces = [
        part.split([rows[rank] * size for rows, size in zip(receive, row_bytes, strict=True)])
        for rank, part in enumerate(parts)
    ]
    return [
        torch.cat([of_rank[index] for of_rank in pieces]).view(tensor.dtype).view(-1, *tensor.shape[1:])
        for index, tensor in enumerate(like)
    ]


def _part_bytes(rows: Splits, row_bytes: list[int]) -> list[int]:
    """Return the bytes that `_pack` makes for each rank."""
    return [sum(map(math.prod, zip(of_rank, row_bytes, strict=True))) for of_rank in zip(*rows, strict=True)]


def _row_bytes(tensors: Sequence[Tensor]) -> list[int]:
    """Return the bytes of a row of each tensor."""
    return [math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors]


def _as_bytes(block: Tensor) -> Tensor:
    return block.reshape(-1).view(torch.uint8)
