"""Rows through shared memory: buffers that grow, a rank that reads late, and ranks that cannot share memory."""

import errno
import mmap
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm import shared_memory
from dist_moe.comm.exchange import exchange_rows, start_exchange_rows
from dist_moe.comm.shared_memory import Buffer, SharedBuffers, _map_of, open_shared_buffers
from tests.collectives import counted
from tests.dist.pool import RankPool


def buffers_of_world() -> SharedBuffers | None:
    """The buffers of the joined world."""
    world = dist.group.WORLD
    assert world is not None
    return open_shared_buffers(world)


def exchange_numbers(buffers: SharedBuffers | None, rows: int, number: int) -> list[int]:
    """Send `rows` rows with the number to the other of two ranks, and none to oneself -> the numbers received."""
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    sent = torch.full((rows, 3), number)
    counts = [0, rows] if rank == 0 else [rows, 0]
    (received,) = exchange_rows([sent], counts, counts, world, buffers)
    assert received.shape == (rows, 3)
    return received.unique().tolist()


def late_reads(rank: int, world_size: int) -> list[list[int]]:
    """Rank 1 reads each time after rank 0 could have gone on."""
    buffers = buffers_of_world()
    assert buffers is not None
    read = SharedBuffers.read

    def read_late(*args: Any) -> bool:
        time.sleep(0.1)
        return read(*args)

    with mock.patch.object(SharedBuffers, "read", read_late if rank == 1 else read):
        found = [exchange_numbers(buffers, 4, 10 * number + rank) for number in range(5)]
    dist.barrier()  # with the function its buffers end
    return found


def test_trap_T36_a_buffer_is_not_written_again_before_all_have_read_it(ranks: RankPool) -> None:
    zero, one = ranks.run(late_reads, 2)
    assert zero == [[10 * number + 1] for number in range(5)]
    assert one == [[10 * number] for number in range(5)]


def growing(rank: int, world_size: int) -> list[list[int]]:
    """Exchanges of more and more rows, then of fewer."""
    buffers = buffers_of_world()
    found = [exchange_numbers(buffers, rows, 10 * rows + rank) for rows in (1, 1000, 1000, 20, 5000, 5000, 5000, 0)]
    dist.barrier()  # with the function its buffers end
    return found


def test_buffers_grow(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(growing, 2)):
        assert found == [[10 * rows + 1 - rank] for rows in (1, 1000, 1000, 20, 5000, 5000, 5000)] + [[]]


def without_memory(rank: int, world_size: int) -> tuple[list[list[int]], int, list[str]]:
    """Rank 1 has no memory for more than a few rows, for a while."""
    buffers, refusal = buffers_of_world(), OSError(errno.ENOMEM, "no memory")
    assert buffers is not None
    reserve = mock.Mock(side_effect=refusal if rank == 1 else os.posix_fallocate)
    found = [exchange_numbers(buffers, 1, rank)]
    with counted("all_to_all_single") as calls, mock.patch.object(shared_memory.logger, "warning") as warning:
        with mock.patch.object(shared_memory.os, "posix_fallocate", reserve):
            found += [exchange_numbers(buffers, rows, rows + rank) for rows in (5000, 4000, 6000)]
        found += [exchange_numbers(buffers, rows, rows + rank) for rows in (4000, 3000)]
    dist.barrier()  # with the function its buffers end
    return found, len(calls), [call.args[0] % call.args[1:] for call in warning.call_args_list]


def test_where_a_rank_has_no_memory_these_rows_take_the_network(ranks: RankPool) -> None:
    for rank, (found, calls, warnings) in enumerate(ranks.run(without_memory, 2)):
        assert found == [[1 - rank], *([rows + 1 - rank] for rows in (5000, 4000, 6000, 4000, 3000))]
        # A message and the rows; then only a message, for what needs less than there was no memory for.
        assert calls == 4 * 2 + 1
        assert len(warnings) == rank
    assert warnings[0].startswith("no shared memory for 120.0 kB of rows (no memory): where as much is exchanged")
    assert warnings[0].endswith("give the workers more memory, or set parallel.shared_memory=false")


def second_before_first(rank: int, world_size: int) -> str:
    """Start two exchanges on the same buffers."""
    buffers, world = buffers_of_world(), dist.group.WORLD
    assert buffers is not None and world is not None
    rows_RD = torch.ones(2, 1)
    first = start_exchange_rows([rows_RD], [1, 1], [1, 1], world, buffers)
    with pytest.raises(RuntimeError) as caught:
        start_exchange_rows([rows_RD], [1, 1], [1, 1], world, buffers)
    first.finish()
    dist.barrier()  # with the function its buffers end
    return str(caught.value)


def test_trap_T36_a_second_exchange_before_the_end_of_the_first_is_refused(ranks: RankPool) -> None:
    message = "a second exchange was started on these buffers before the first was finished; call its finish() first"
    assert ranks.run(second_before_first, 2) == [message] * 2


def after_the_end(rank: int, world_size: int) -> str:
    """Rank 0 ends the life of its larger buffer before rank 1 opens it, as a rank that fails does."""
    buffers, world = buffers_of_world(), dist.group.WORLD
    assert buffers is not None and world is not None
    rows_RD = torch.ones(5000, 1)
    counts = [0, 5000] if rank == 0 else [5000, 0]
    exchange = start_exchange_rows([rows_RD], counts, counts, world, buffers)
    if rank == 0:
        buffers._buffers.clear()
    dist.barrier()
    if rank == 0:
        dist.barrier()
        return ""
    with pytest.raises(RuntimeError) as caught:
        exchange.finish()
    dist.barrier()
    return str(caught.value)


def test_rows_of_a_rank_that_has_ended_are_a_clear_error(ranks: RankPool) -> None:
    _, message = ranks.run(after_the_end, 2)
    assert message.startswith("the rows of rank 0 of the group in shared memory cannot be read (")
    assert message.endswith("its own error is the cause, otherwise set parallel.shared_memory=false")


@pytest.mark.parametrize("stranger", ["a file", "a shorter buffer"])
def test_another_file_under_the_number_of_a_buffer_is_not_read(tmp_path: Path, stranger: str) -> None:
    (tmp_path / "file").write_bytes(bytes(mmap.PAGESIZE))
    if stranger == "a file":
        descriptor = os.open(tmp_path / "file", os.O_RDWR)
    else:
        buffer = Buffer(mmap.PAGESIZE // 2)
        descriptor = os.dup(buffer.descriptor)
    try:
        with pytest.raises(OSError, match=r"is not a buffer of dist_moe|has not 4096 bytes"):
            _map_of(os.getpid(), descriptor, mmap.PAGESIZE)
    finally:
        os.close(descriptor)


def refused(rank: int, world_size: int, failure: str) -> bool:
    """Whether the world has buffers although rank 1 fails in some way."""
    refusal = OSError(errno.EACCES, "no")
    patches = {
        "another host": mock.patch.object(shared_memory.socket, "gethostname", return_value=f"host{rank}"),
        "another system": mock.patch.object(shared_memory, "os", mock.Mock(spec=["getpid"], getpid=lambda: 1)),
        "no memory": mock.patch.object(shared_memory, "Buffer", side_effect=refusal),
        "another user": mock.patch.object(shared_memory, "_map_of", side_effect=refusal),
    }
    with patches[failure] if rank == 1 else mock.MagicMock():
        return buffers_of_world() is not None


@pytest.mark.parametrize("failure", ["another host", "another system", "no memory", "another user"])
def test_all_ranks_share_memory_or_none(ranks: RankPool, failure: str) -> None:
    assert ranks.run(refused, 2, failure) == [False, False]
