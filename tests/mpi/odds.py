"""A program for mpirun: objects, averages, booleans, time-outs and errors, which gloo lacks or handles differently."""

import os
import pickle
import sys
import time

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm.init import set_pg_timeouts
from dist_moe.comm.mpi import backend
from dist_moe.comm.objects import ExchangeError
from dist_moe.worker.rank_info import rank_info_from_env


def objects(rank: int, size: int) -> None:
    gathered: list[object] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank * 1000})
    assert [one["rank"] for one in gathered if isinstance(one, dict)] == list(range(size))
    objects = [f"from {rank}"]
    dist.broadcast_object_list(objects, src=size - 1)
    assert objects == [f"from {size - 1}"]


def checked_objects(rank: int, size: int) -> None:
    """Our own exchange, which needs no process group: of different lengths, and a pickle, which is refused."""
    mine = ("x" * rank * 1000, rank, float("nan"), bytes([rank, 255]))
    gathered = backend.all_gather_objects(mine, tuple[str, int, float, bytes])
    assert repr(gathered) == repr([("x" * i * 1000, i, float("nan"), bytes([i, 255])) for i in range(size)])
    real = backend.encode
    if rank == 1:
        backend.encode = lambda value: pickle.dumps(value)
    with pytest.raises(ExchangeError, match="rank 1 sent a value that is not of type str"):
        backend.all_gather_objects("own", str)
    backend.encode = real


def averages_and_booleans(rank: int, size: int) -> None:
    mean = torch.tensor([float(rank), 1.0])
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert mean.tolist() == [(size - 1) / 2, 1.0]
    any_true = torch.tensor([rank == 1, False, True])
    dist.all_reduce(any_true, dist.ReduceOp.MAX)
    assert any_true.tolist() == [True, False, True]


def rounded_once(rank: int, size: int) -> None:
    """bf16 cannot represent 256 + 1: added one by one in bf16 the ones are lost, added in fp32 they are not."""
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


def uneven_lists(rank: int, size: int) -> None:
    """Parts of different sizes for different ranks, which gloo does not support."""
    gathered = [torch.empty(one + 1) for one in range(size)]
    dist.all_gather(gathered, torch.full((rank + 1,), float(rank)))
    assert [part.tolist() for part in gathered] == [[float(one)] * (one + 1) for one in range(size)]
    added = torch.empty(rank + 1)
    dist.reduce_scatter(added, [torch.full((one + 1,), float(rank + one)) for one in range(size)])
    assert added.tolist() == [sum(range(size)) + size * float(rank)] * (rank + 1)
    received = [torch.empty(rank + one) for one in range(size)]
    dist.all_to_all(received, [torch.full((one + rank,), float(10 * rank + one)) for one in range(size)])
    assert [part.tolist() for part in received] == [[10.0 * one + rank] * (rank + one) for one in range(size)]


def coalesced(rank: int, size: int) -> None:
    """Several collectives of a kind at once, as ZeRO uses them."""
    inputs = [torch.full((2,), float(rank)), torch.full((3,), rank + 0.5)]
    wholes = [torch.empty(size * len(one)) for one in inputs]
    with dist._coalescing_manager():
        for whole, one in zip(wholes, inputs, strict=True):
            dist.all_gather_into_tensor(whole, one)
    assert wholes[0].tolist() == [float(one) for one in range(size) for _ in range(2)]
    assert wholes[1].tolist() == [one + 0.5 for one in range(size) for _ in range(3)]
    parts = [torch.empty(2), torch.empty(3)]
    with dist._coalescing_manager():
        for part, whole in zip(parts, wholes, strict=True):
            dist.reduce_scatter_tensor(part, whole)
    assert [part.tolist() for part in parts] == [[float(size * rank)] * 2, [size * (rank + 0.5)] * 3]
    sums = [torch.ones(2), torch.ones(3) * rank]
    with dist._coalescing_manager():
        for one in sums:
            dist.all_reduce(one)
    assert [one.tolist() for one in sums] == [[float(size)] * 2, [float(sum(range(size)))] * 3]


def in_place(rank: int, size: int) -> None:
    """Inputs that overlap outputs, which MPI forbids and the backend copies."""
    whole = torch.zeros(2 * size)
    whole[2 * rank : 2 * rank + 2] = rank + 1.0
    dist.all_gather_into_tensor(whole, whole[2 * rank : 2 * rank + 2])
    assert whole.tolist() == [one + 1.0 for one in range(size) for _ in range(2)]
    dist.reduce_scatter_tensor(whole[:2], whole)
    assert whole[:2].tolist() == [size * (rank + 1.0)] * 2
    swapped = torch.arange(size) + 100 * rank
    dist.all_to_all_single(swapped, swapped)
    assert swapped.tolist() == [100 * one + rank for one in range(size)]


def of_parameters(rank: int, size: int) -> None:
    """Autograd does not track collectives."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.full((4, 6), float(rank), dtype=dtype))
        dist.all_reduce(weight, dist.ReduceOp.AVG)
        assert weight.detach().eq((size - 1) / 2).all()
        dist.broadcast(weight[:, ::2], 0)
        received = torch.nn.Parameter(torch.empty(size, dtype=dtype))
        dist.all_gather([received[one : one + 1] for one in range(size)], torch.full((1,), float(rank), dtype=dtype))
        assert received.tolist() == list(range(size))


def errors(rank: int, size: int) -> None:
    with pytest.raises(TypeError, match=r"has no AVG of torch\.int64; use another"):
        dist.all_reduce(torch.ones(1, dtype=torch.int64), dist.ReduceOp.AVG)
    with pytest.raises(TypeError, match=r"has no BAND of torch\.float32"):
        dist.all_reduce(torch.ones(1), dist.ReduceOp.BAND)
    with pytest.raises(TypeError, match=r"has no SUM of torch\.uint32"):
        dist.all_reduce(torch.ones(1, dtype=torch.uint32))


def dropped_work(rank: int, size: int) -> None:
    """Memory that MPI still writes to stays alive, also where the caller drops the work."""
    for _ in range(50):
        dist.all_reduce(torch.ones(50_000), async_op=True)
    dist.barrier()


def time_out(rank: int, size: int) -> None:
    """Last, since the communicator cannot be used afterwards."""
    group = dist.new_group()
    set_pg_timeouts(1.5)
    dist.all_reduce(torch.ones(1), group=group)
    assert group._get_sequence_number_for_group() == 1
    if rank == 0:
        began_s = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"all-reduce among {size} ranks timed out after 1.5 s: another rank"):
            dist.all_reduce(torch.ones(1), group=group)
        assert 1.4 < time.monotonic() - began_s < 10
    set_pg_timeouts(60)
    dist.barrier()
    sys.stdout.write(f"rank {rank} passed\n")
    sys.stdout.flush()
    os._exit(0)


STEPS = (
    objects,
    checked_objects,
    averages_and_booleans,
    rounded_once,
    futures_and_sources,
    uneven_lists,
    coalesced,
    in_place,
    of_parameters,
    errors,
    dropped_work,
    time_out,
)


def main() -> None:
    rank_info = rank_info_from_env(os.environ)
    rank, size = rank_info.rank, rank_info.world_size
    dist.init_process_group(
        backend.register(), init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=rank, world_size=size
    )
    for step in STEPS:
        step(rank, size)


if __name__ == "__main__":
    main()
