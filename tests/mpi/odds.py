"""A program for mpirun: objects, averages, truth values, time-outs and mistakes, where gloo is no measure."""

import os
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm import mpi
from dist_moe.comm.place import read_place


def objects(rank: int, size: int) -> None:
    found: list[object] = [None] * size
    dist.all_gather_object(found, {"rank": rank, "text": "x" * rank * 1000})
    assert [one["rank"] for one in found if isinstance(one, dict)] == list(range(size))
    told = [f"from {rank}"]
    dist.broadcast_object_list(told, src=size - 1)
    assert told == [f"from {size - 1}"]


def averages_and_truth(rank: int, size: int) -> None:
    mean = torch.tensor([float(rank), 1.0])
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert mean.tolist() == [(size - 1) / 2, 1.0]
    any_true = torch.tensor([rank == 1, False, True])
    dist.all_reduce(any_true, dist.ReduceOp.MAX)
    assert any_true.tolist() == [True, False, True]


def rounded_once(rank: int, size: int) -> None:
    """256 + 1 is no number of bf16: added one by one the ones are lost, added in fp32 they are not."""
    total = torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16)
    dist.all_reduce(total)
    assert total.item() == torch.tensor(256.0 + size - 1).bfloat16().item()


def futures_and_sources(rank: int, size: int) -> None:
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert work is not None
    (total,) = work.get_future().wait()
    assert total.tolist() == [size, size]
    if rank == 0:
        received = torch.empty(1, dtype=torch.int64)
        senders = [dist.recv(received) for _ in range(size - 1)]
        assert sorted(senders) == list(range(1, size))
    else:
        dist.send(torch.tensor([rank]), 0)


def mistakes(rank: int, size: int) -> None:
    with pytest.raises(TypeError, match=r"has no AVG of torch\.int64; take another"):
        dist.all_reduce(torch.ones(1, dtype=torch.int64), dist.ReduceOp.AVG)
    with pytest.raises(TypeError, match=r"has no BAND of torch\.float32"):
        dist.all_reduce(torch.ones(1), dist.ReduceOp.BAND)


def forgotten(rank: int, size: int) -> None:
    """Memory that MPI still writes to is kept, also where nobody keeps the work."""
    for _ in range(50):
        dist.all_reduce(torch.ones(50_000), async_op=True)
    dist.barrier()


def time_out(rank: int, size: int) -> None:
    """Last, since the communicator is of no use afterwards."""
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    if rank == 0:
        began_s = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"all-reduce among {size} ranks timed out after 1.5 s: another rank"):
            dist.all_reduce(torch.ones(1), group=group)
        assert 1.4 < time.monotonic() - began_s < 10
    dist.barrier()
    sys.stdout.write(f"rank {rank} is through\n")
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    place = read_place(os.environ)
    rank, size = place.rank, place.world_size
    dist.init_process_group(mpi.register(), init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=rank, world_size=size)
    for step in (objects, averages_and_truth, rounded_once, futures_and_sources, mistakes, forgotten, time_out):
        step(rank, size)


if __name__ == "__main__":
    main()
