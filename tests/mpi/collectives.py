"""A program for mpirun: compares every collective of the MPI backend with gloo's, on tensors of random sizes."""

import os
import random
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.comm.mpi import backend
from dist_moe.worker.rank_info import rank_info_from_env

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)
GLOO_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)
TIMEOUT = timedelta(seconds=60)
ROUNDS = 6

Action = Callable[[dist.ProcessGroup], list[Tensor]]


class Pair:
    """The same ranks as a group of each backend, with random draws: `draw` is equal on all ranks, tensors differ."""

    def __init__(self, ranks: list[int], seed: int) -> None:
        self.ranks = ranks
        self.mpi = dist.new_group(ranks, backend=backend.NAME, timeout=TIMEOUT)
        self.gloo = dist.new_group(ranks, backend="gloo", timeout=TIMEOUT)
        self.draw = random.Random(seed)
        self.size = len(ranks)
        self.rank = ranks.index(dist.get_rank()) if dist.get_rank() in ranks else -1

    def length(self) -> int:
        """A random length, the same on all ranks; 0 and 1 are likely."""
        return self.draw.choice((0, 1, self.draw.randrange(2, 40), self.draw.randrange(40, 5000)))

    def root(self) -> int:
        """A random global rank, the same on all ranks."""
        return self.draw.choice(self.ranks)

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Small integers, so that sums are exact in every dtype and order."""
        seed = self.draw.randrange(2**31) + 7919 * self.rank
        numbers = torch.randint(
            0 if dtype == torch.uint8 else -3, 4, shape, generator=torch.Generator().manual_seed(seed)
        )
        return numbers.to(dtype)


def broadcast(pair: Pair, dtype: torch.dtype) -> Action:
    tensor, root = pair.tensor(pair.length(), 3, dtype=dtype), pair.root()

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        mine = tensor.clone()
        dist.broadcast(mine, root, group=group)
        return [mine]

    return act


def all_reduce(pair: Pair, dtype: torch.dtype) -> Action:
    tensor = pair.tensor(pair.length(), dtype=dtype)
    operations = [dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT]
    operation = pair.draw.choice(operations)

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        mine = tensor.clone()
        dist.all_reduce(mine, operation, group=group)
        return [mine]

    return act


def reduce(pair: Pair, dtype: torch.dtype) -> Action:
    tensor, root = pair.tensor(pair.length() + 1, dtype=dtype), pair.root()

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        mine = tensor.clone()
        dist.reduce(mine, root, group=group)
        return [mine] if dist.get_rank() == root else []

    return act


def all_gather_into_tensor(pair: Pair, dtype: torch.dtype) -> Action:
    tensor = pair.tensor(pair.length(), 2, dtype=dtype)

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        gathered = tensor.new_empty(pair.size * len(tensor), 2)
        dist.all_gather_into_tensor(gathered, tensor, group=group)
        return [gathered]

    return act


def all_gather(pair: Pair, dtype: torch.dtype) -> Action:
    tensor = pair.tensor(pair.length(), 2, dtype=dtype)

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(pair.size)]
        dist.all_gather(gathered, tensor, group=group)
        return gathered

    return act


def gather(pair: Pair, dtype: torch.dtype) -> Action:
    tensor, root = pair.tensor(pair.length(), dtype=dtype), pair.root()

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(pair.size)] if dist.get_rank() == root else None
        dist.gather(tensor, gathered, root, group=group)
        return gathered or []

    return act


def scatter(pair: Pair, dtype: torch.dtype) -> Action:
    length, root = pair.length(), pair.root()
    parts = [pair.tensor(length, dtype=dtype) for _ in range(pair.size)]

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        mine = torch.empty_like(parts[0])
        dist.scatter(mine, parts if dist.get_rank() == root else None, root, group=group)
        return [mine]

    return act


def reduce_scatter(pair: Pair, dtype: torch.dtype) -> Action:
    length = pair.length()
    parts = [pair.tensor(length, dtype=dtype) for _ in range(pair.size)]

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, [part.clone() for part in parts], group=group)
        return [mine]

    return act


def reduce_scatter_tensor(pair: Pair, dtype: torch.dtype) -> Action:
    tensor = pair.tensor(pair.size * pair.length(), dtype=dtype)

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        mine = tensor.new_empty(len(tensor) // pair.size)
        dist.reduce_scatter_tensor(mine, tensor.clone(), group=group)
        return [mine]

    return act


def all_to_all_even(pair: Pair, dtype: torch.dtype) -> Action:
    tensor = pair.tensor(pair.size * pair.length(), 4, dtype=dtype)

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=group)
        return [received]

    return act


def all_to_all_uneven(pair: Pair, dtype: torch.dtype) -> Action:
    rows = [[pair.length() for _ in range(pair.size)] for _ in range(pair.size)]
    width = pair.draw.choice((1, 5))
    tensor = pair.tensor(sum(rows[pair.rank]), width, dtype=dtype)
    receive = [of_sender[pair.rank] for of_sender in rows]

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        received = tensor.new_empty(sum(receive), width)
        dist.all_to_all_single(received, tensor, receive, rows[pair.rank], group=group)
        return [received]

    return act


def not_contiguous(pair: Pair, dtype: torch.dtype) -> Action:
    """Every second column of a tensor, which MPI cannot write to as one message."""
    tensor, root = pair.tensor(pair.length() + 1, 6, dtype=dtype), pair.root()

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        wide = tensor.clone()
        part = wide[:, ::2] if group is pair.mpi else wide[:, ::2].contiguous()
        dist.broadcast(part, root, group=group)
        wide[:, ::2] = part
        return [wide]

    return act


def send_and_receive(pair: Pair, dtype: torch.dtype) -> Action:
    """Around a ring, two messages at once with different tags."""
    length = pair.length()
    parts = [pair.tensor(length, dtype=dtype) for _ in range(2)]

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        right, left = pair.ranks[(pair.rank + 1) % pair.size], pair.ranks[pair.rank - 1]
        received = [torch.empty_like(part) for part in parts]
        works = [dist.isend(part, right, group=group, tag=tag) for tag, part in enumerate(parts)]
        works += [dist.irecv(received[tag], left, group=group, tag=tag) for tag in (1, 0)]
        for work in works:
            assert work is not None
            work.wait()
        return received

    return act


def asynchronous(pair: Pair, dtype: torch.dtype) -> Action:
    """Three in flight at once, waited for in another order."""
    parts = [pair.tensor(pair.length(), dtype=dtype) for _ in range(3)]

    def act(group: dist.ProcessGroup) -> list[Tensor]:
        mine = [part.clone() for part in parts]
        works = [dist.all_reduce(part, group=group, async_op=True) for part in mine]
        for work in reversed(works):
            assert work is not None
            work.wait()
            assert work.is_completed()
        return mine

    return act


MOVES = (
    broadcast,
    all_gather_into_tensor,
    all_gather,
    gather,
    scatter,
    all_to_all_even,
    all_to_all_uneven,
    not_contiguous,
    send_and_receive,
)
SUMS = (all_reduce, reduce, reduce_scatter, reduce_scatter_tensor, asynchronous)


def compare(pair: Pair, make: Callable[[Pair, torch.dtype], Action], dtype: torch.dtype) -> int:
    """Run one collective on both backends, gloo with int32 for a dtype that it lacks; return the number of tensors."""
    state = pair.draw.getstate()
    ours = make(pair, dtype)(pair.mpi)
    pair.draw.setstate(state)
    theirs = make(pair, dtype if dtype in GLOO_DTYPES else torch.int32)(pair.gloo)
    for mine, expected in zip(ours, theirs, strict=True):
        message = f"rank {dist.get_rank()}: {make.__name__} of {dtype} among {pair.ranks}: {mine} is not {expected}"
        assert torch.equal(mine, expected.to(dtype)), message
    return len(ours)


def main() -> None:
    """Print the number of equal tensors; an error names the first that differs."""
    rank_info = rank_info_from_env(os.environ)
    rank, size = rank_info.rank, rank_info.world_size
    torch.set_num_threads(1)
    dist.init_process_group(
        backend.register(), init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    agreed = 0
    all_ranks = list(range(size))
    for number, ranks in enumerate((all_ranks, all_ranks[::2], all_ranks[1:])):
        pair = Pair(ranks, seed=number)
        if rank not in ranks:
            continue
        moves = [make for make in MOVES if len(ranks) > 1 or make is not send_and_receive]  # gloo cannot send to itself
        for make, dtype in [*product(moves, DTYPES), *product(SUMS, GLOO_DTYPES)]:
            agreed += sum(compare(pair, make, dtype) for _ in range(ROUNDS))
    dist.barrier()
    sys.stdout.write(f"rank {rank}: {agreed} agreed\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
