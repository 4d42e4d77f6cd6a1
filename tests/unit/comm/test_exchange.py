"""The all-to-all of rows with uneven blocks, both ways, and of counts."""

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm.exchange import exchange_rows, start_exchange_counts
from dist_moe.comm.shared_memory import open_shared_buffers
from tests.dist.pool import RankPool

SEND = [[1, 0, 3], [2, 0, 0], [0, 0, 4]]  # SEND[p][q]: rows from rank p to rank q; rank 1 receives none


def label(sender: int, receiver: int, row: int) -> float:
    """The value of a row, different for each."""
    return float(100 * sender + 10 * receiver + row)


def exchange(rank: int, world_size: int, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels of the rows received, and the gradients of the rows sent, each weighted by ten times its label."""
    world = dist.group.WORLD
    assert world is not None
    buffers = open_shared_buffers(world) if shared else None
    assert (buffers is not None) == shared
    labels = [label(rank, to, row) for to in range(world_size) for row in range(SEND[rank][to])]
    rows_RD = torch.tensor(labels, requires_grad=True).unsqueeze(1).expand(-1, 2)
    receive = [SEND[sender][rank] for sender in range(world_size)]
    received_QD, received_Q = exchange_rows([rows_RD, rows_RD.detach()[:, 0]], SEND[rank], receive, world, buffers)
    assert received_QD.shape == (sum(receive), 2) and torch.equal(received_Q, received_QD.detach()[:, 0])
    rows_RD.retain_grad()
    (received_QD * 10 * received_QD.detach()).sum().backward()
    assert rows_RD.grad is not None
    return received_QD.detach()[:, 0], rows_RD.grad[:, 1]


@pytest.mark.parametrize("shared", [False, True])
def test_rows_arrive_by_sender_and_gradients_return_to_their_rows(ranks: RankPool, shared: bool) -> None:
    for rank, (received, gradient) in enumerate(ranks.run(exchange, 3, shared, timeout_s=60)):
        assert received.tolist() == [label(p, rank, row) for p in range(3) for row in range(SEND[p][rank])]
        assert gradient.tolist() == [10 * label(rank, q, row) for q in range(3) for row in range(SEND[rank][q])]


def counts(rank: int, world_size: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """Exchange a table whose entries encode sender, receiver and column."""
    world = dist.group.WORLD
    assert world is not None
    table_PN = torch.tensor([[100 * rank + 10 * to + column for column in range(3)] for to in range(world_size)])
    return start_exchange_counts(table_PN, world).finish()


def test_row_p_of_the_counts_goes_to_rank_p_and_comes_from_rank_p(ranks: RankPool) -> None:
    for rank, (received_PN, send, receive) in enumerate(ranks.run(counts, 2)):
        assert received_PN.dtype == torch.int64
        assert received_PN.tolist() == [[100 * p + 10 * rank + column for column in range(3)] for p in range(2)]
        assert send == [3 * (100 * rank + 10 * p) + 3 for p in range(2)], "the sums over the columns"
        assert receive == [3 * (100 * p + 10 * rank) + 3 for p in range(2)]
