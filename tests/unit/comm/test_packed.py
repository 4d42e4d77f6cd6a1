"""Several tensors in one all-to-all, of as many rows as come: in one message, in two, and back."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.comm import packed
from tests.collectives import counted
from tests.dist.pool import RankPool

WIDTH = 5


def rows_sent(sender: int, receiver: int, most: int) -> int:
    """Different for each pair; rank 1 is sent nothing, and only rank 0 sends rank 2 the most."""
    return 0 if receiver == 1 else most if (sender, receiver) == (0, 2) else sender + receiver


def tensors_of(sender: int, receiver: int, most: int) -> list[Tensor]:
    """Of each row: floats, two numbers, a narrower float, and a flag; 53 bytes."""
    rows = rows_sent(sender, receiver, most)
    label = torch.arange(rows * WIDTH, dtype=torch.float64).view(rows, WIDTH) + 1e4 * (3 * sender + receiver)
    return [label, torch.arange(2 * rows, dtype=torch.int32) + receiver, label[:, 0].float() / 2, label[:, 1] > 7]


def exchange(rank: int, world_size: int, most: int) -> tuple[list[Tensor], list[list[int]], list[Tensor]]:
    """What arrives, from whom, and the gradients that come back when what arrived is squared."""
    world = dist.group.WORLD
    assert world is not None
    of_receiver = [tensors_of(rank, receiver, most) for receiver in range(world_size)]
    tensors = [torch.cat(blocks) for blocks in zip(*of_receiver, strict=True)]
    floats = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
    send = [[len(block) for block in blocks] for blocks in zip(*of_receiver, strict=True)]
    arrived, receive = packed.exchange_packed(tensors, send, world)
    sum(one.double().square().sum() for one in arrived if one.is_floating_point()).backward()  # type: ignore
    return [one.detach() for one in arrived], receive, [one.grad for one in floats if one.grad is not None]


@pytest.mark.parametrize("most", [0, 3, 308, 309, 5000])
def test_what_is_sent_arrives_by_sender_whether_or_not_it_fits_the_first_message(ranks: RankPool, most: int) -> None:
    for rank, (arrived, receive, gradients) in enumerate(ranks.run(exchange, 3, most)):
        of_sender = [tensors_of(sender, rank, most) for sender in range(3)]
        assert receive == [[len(block) for block in blocks] for blocks in zip(*of_sender, strict=True)]
        for found, blocks in zip(arrived, zip(*of_sender, strict=True), strict=True):
            assert torch.equal(found, torch.cat(blocks))
        sent = [torch.cat(blocks) for blocks in zip(*(tensors_of(rank, to, most) for to in range(3)), strict=True)]
        for gradient, tensor in zip(gradients, [sent[0], sent[2]], strict=True):
            assert torch.equal(gradient, 2 * tensor)


def test_the_first_message_is_full_before_there_is_a_second(ranks: RankPool) -> None:
    row_bytes, head_bytes = 40 + 8 + 4 + 1, 5 * packed.NUMBER_BYTES
    fits = (packed.FIRST_BYTES - head_bytes) // row_bytes
    assert ranks.run(count_calls, 3, fits) == [1, 1, 1]
    assert ranks.run(count_calls, 3, fits + 1) == [2, 2, 2]


def count_calls(rank: int, world_size: int, most: int) -> int:
    """All-to-alls of a forward."""
    world = dist.group.WORLD
    assert world is not None
    of_receiver = [tensors_of(rank, receiver, most) for receiver in range(world_size)]
    send = [[len(block) for block in blocks] for blocks in zip(*of_receiver, strict=True)]
    with counted("all_to_all_single") as calls:
        packed.exchange_packed([torch.cat(blocks) for blocks in zip(*of_receiver, strict=True)], send, world)
    return len(calls)
