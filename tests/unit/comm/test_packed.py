"""Several tensors in one all-to-all, of row counts that receivers do not know: in one message, in two, and back."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.comm import packed
from tests.collectives import counted
from tests.dist.pool import RankPool

WIDTH = 5


def rows_sent(sender: int, receiver: int, most: int) -> int:
    """Rows for each pair; rank 1 receives none, and only rank 0 sends `most` to rank 2."""
    return 0 if receiver == 1 else most if (sender, receiver) == (0, 2) else sender + receiver


def tensors_of(sender: int, receiver: int, most: int) -> list[Tensor]:
    """Per row: float64 values, two int32, a float32 and a bool; 53 bytes."""
    rows = rows_sent(sender, receiver, most)
    label = torch.arange(rows * WIDTH, dtype=torch.float64).view(rows, WIDTH) + 1e4 * (3 * sender + receiver)
    return [label, torch.arange(2 * rows, dtype=torch.int32) + receiver, label[:, 0].float() / 2, label[:, 1] > 7]


def exchange(rank: int, world_size: int, most: int) -> tuple[list[Tensor], list[list[int]], list[Tensor]]:
    """The rows received, their numbers, and the gradients of the sum of their squares."""
    world = dist.group.WORLD
    assert world is not None
    of_receiver = [tensors_of(rank, receiver, most) for receiver in range(world_size)]
    tensors = [torch.cat(blocks) for blocks in zip(*of_receiver, strict=True)]
    floats = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
    send = [[len(block) for block in blocks] for blocks in zip(*of_receiver, strict=True)]
    received, receive = packed.exchange_packed(tensors, send, world)
    sum(one.double().square().sum() for one in received if one.is_floating_point()).backward()  # type: ignore
    return [one.detach() for one in received], receive, [one.grad for one in floats if one.grad is not None]


@pytest.mark.parametrize("most", [0, 3, 308, 309, 5000])
def test_rows_arrive_by_sender_in_one_message_or_two(ranks: RankPool, most: int) -> None:
    for rank, (received, receive, gradients) in enumerate(ranks.run(exchange, 3, most)):
        of_sender = [tensors_of(sender, rank, most) for sender in range(3)]
        assert receive == [[len(block) for block in blocks] for blocks in zip(*of_sender, strict=True)]
        for rows, blocks in zip(received, zip(*of_sender, strict=True), strict=True):
            assert torch.equal(rows, torch.cat(blocks))
        sent = [torch.cat(blocks) for blocks in zip(*(tensors_of(rank, to, most) for to in range(3)), strict=True)]
        for gradient, tensor in zip(gradients, [sent[0], sent[2]], strict=True):
            assert torch.equal(gradient, 2 * tensor)


def test_there_is_a_second_message_only_where_the_first_is_full(ranks: RankPool) -> None:
    row_bytes, head_bytes = 40 + 8 + 4 + 1, 5 * packed.NUMBER_BYTES
    fits = (packed.FIRST_BYTES - head_bytes) // row_bytes
    assert ranks.run(count_calls, 3, fits) == [1, 1, 1]
    assert ranks.run(count_calls, 3, fits + 1) == [2, 2, 2]


def count_calls(rank: int, world_size: int, most: int) -> int:
    """Number of all-to-alls of a forward."""
    world = dist.group.WORLD
    assert world is not None
    of_receiver = [tensors_of(rank, receiver, most) for receiver in range(world_size)]
    send = [[len(block) for block in blocks] for blocks in zip(*of_receiver, strict=True)]
    with counted("all_to_all_single") as calls:
        packed.exchange_packed([torch.cat(blocks) for blocks in zip(*of_receiver, strict=True)], send, world)
    return len(calls)
