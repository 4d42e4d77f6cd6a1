"""Sums over ranks: exact counts and named numbers."""

import pytest
import torch
from torch import Tensor

from dist_moe.comm.reduce import all_reduce_counts, all_reduce_scalars
from tests.collectives import counted
from tests.dist.pool import RankPool

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool])
def test_trap_T05_counts_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"counts are {dtype}; load counts are int64"):
        all_reduce_counts([torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=dtype)], CPU)


def test_a_single_rank_sums_over_itself() -> None:
    counts = [torch.tensor([3, 4]), torch.tensor(5)]
    assert [count.tolist() for count in all_reduce_counts(counts, CPU)] == [[3, 4], 5]
    assert all_reduce_scalars({"nats": 1.5, "tokens": 2}, CPU) == {"nats": 1.5, "tokens": 2.0}


def sums(rank: int, world_size: int) -> tuple[list[Tensor], dict[str, float], int]:
    """Sums of counts above 2**24 that differ by one, sums of numbers, and the number of collectives for the counts."""
    shapes = [torch.tensor([2**24 + rank, 1]), torch.tensor(2**53 * rank + 1), torch.zeros(0, dtype=torch.int64)]
    with counted("all_reduce") as calls:
        summed = all_reduce_counts([*shapes, torch.ones(2, 3, dtype=torch.int64)], CPU)
    return summed, all_reduce_scalars({"nats": 0.5 + rank, "tokens": 7}, CPU), len(calls)


def test_trap_T05_counts_above_2_to_the_24_are_summed_to_the_last_unit(ranks: RankPool) -> None:
    for counts, scalars, collectives in ranks.run(sums, 2):
        assert [count.dtype for count in counts] == [torch.int64] * 4
        assert [count.tolist() for count in counts] == [[2**25 + 1, 2], 2**53 + 2, [], [[2] * 3] * 2]
        assert collectives == 1
        assert scalars == {"nats": 2.0, "tokens": 14.0}


def nothing_then_something(rank: int, world_size: int) -> int:
    """An empty list makes no collective, so the next one matches that of the other ranks."""
    assert all_reduce_counts([], CPU) == []
    return int(all_reduce_counts([torch.tensor(rank + 1)], CPU)[0])


def test_trap_T16_nothing_to_sum_makes_no_collective(ranks: RankPool) -> None:
    assert ranks.run(nothing_then_something, 2, timeout_s=60) == [3, 3]
