"""Rows through shared memory: boxes that grow, a rank that reads late, and ranks that cannot share memory."""

import errno
import os
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm import shared_memory
from dist_moe.comm.exchange import exchange_rows
from dist_moe.comm.shared_memory import SharedBoxes, open_shared_boxes
from tests.collectives import counted
from tests.dist.pool import RankPool


def boxes_of_world() -> SharedBoxes | None:
    """The boxes of the joined world."""
    world = dist.group.WORLD
    assert world is not None
    return open_shared_boxes(world)


def exchange_numbers(boxes: SharedBoxes | None, rows: int, number: int) -> list[int]:
    """Send `rows` rows with the number to the other of two ranks, and none to oneself -> the numbers received."""
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    sent = torch.full((rows, 3), number)
    counts = [0, rows] if rank == 0 else [rows, 0]
    (received,) = exchange_rows([sent], counts, counts, world, boxes)
    assert received.shape == (rows, 3)
    return received.unique().tolist()


def late_reads(rank: int, world_size: int) -> list[list[int]]:
    """Rank 1 reads each time after rank 0 could have gone on."""
    boxes = boxes_of_world()
    assert boxes is not None
    read = SharedBoxes.read

    def read_late(*args: Any) -> bool:
        time.sleep(0.1)
        return read(*args)

    with mock.patch.object(SharedBoxes, "read", read_late if rank == 1 else read):
        found = [exchange_numbers(boxes, 4, 10 * number + rank) for number in range(5)]
    dist.barrier()  # with the function its boxes end
    return found


def test_trap_T36_a_box_is_not_written_again_before_all_have_read_it(ranks: RankPool) -> None:
    zero, one = ranks.run(late_reads, 2)
    assert zero == [[10 * number + 1] for number in range(5)]
    assert one == [[10 * number] for number in range(5)]


def growing(rank: int, world_size: int) -> list[list[int]]:
    """Exchanges of more and more rows, then of fewer."""
    boxes = boxes_of_world()
    found = [exchange_numbers(boxes, rows, 10 * rows + rank) for rows in (1, 1000, 1000, 20, 5000, 5000, 5000, 0)]
    dist.barrier()  # with the function its boxes end
    return found


def test_boxes_grow(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(growing, 2)):
        assert found == [[10 * rows + 1 - rank] for rows in (1, 1000, 1000, 20, 5000, 5000, 5000)] + [[]]


def without_memory(rank: int, world_size: int) -> tuple[list[list[int]], int]:
    """Rank 1 has no memory for the second exchange."""
    boxes, refusal = boxes_of_world(), OSError(errno.ENOMEM, "no memory")
    assert boxes is not None
    reserve = mock.Mock(side_effect=refusal if rank == 1 else os.posix_fallocate)
    found = [exchange_numbers(boxes, 1, rank)]
    with counted("all_to_all_single") as calls:
        with mock.patch.object(shared_memory.os, "posix_fallocate", reserve):
            found.append(exchange_numbers(boxes, 5000, 10 + rank))
        found.append(exchange_numbers(boxes, 5000, 20 + rank))
    dist.barrier()  # with the function its boxes end
    return found, len(calls)


def test_where_a_rank_has_no_memory_these_rows_take_the_network(ranks: RankPool) -> None:
    for rank, (found, calls) in enumerate(ranks.run(without_memory, 2)):
        assert found == [[1 - rank], [11 - rank], [21 - rank]]
        assert calls == 3, "a message and the rows, then a message"


def refused(rank: int, world_size: int, failure: str) -> bool:
    """Whether the world has boxes although rank 1 fails in some way."""
    refusal = OSError(errno.EACCES, "no")
    patches = {
        "another host": mock.patch.object(shared_memory.socket, "gethostname", return_value=f"host{rank}"),
        "another system": mock.patch.object(shared_memory, "os", mock.Mock(spec=["getpid"], getpid=lambda: 1)),
        "no memory": mock.patch.object(shared_memory, "Box", side_effect=refusal),
        "another user": mock.patch.object(shared_memory, "_map_of", side_effect=refusal),
    }
    with patches[failure] if rank == 1 else mock.MagicMock():
        return boxes_of_world() is not None


@pytest.mark.parametrize("failure", ["another host", "another system", "no memory", "another user"])
def test_all_ranks_share_memory_or_none(ranks: RankPool, failure: str) -> None:
    assert ranks.run(refused, 2, failure) == [False, False]
