"""Flat gradients against plain sums of the gradients of all ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.engine.flat_gradients import BLOCK, FlatGradients, FlatGroup, sum_of_squares
from tests.dist.pool import RankPool


def averaged(rank: int, world_size: int, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """Add the gradients rank + 1 and 10 of two micro-batches; the second parameter of each group has none."""
    alone = [dist.new_group([other]) for other in range(world_size)][rank]
    assert isinstance(alone, dist.ProcessGroup) and dist.group.WORLD is not None
    shapes = ((2, 2), (3,), (1,))
    shared, own = ([nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes] for _ in range(2))
    # 8 elements and padding: a multiple of the number of ranks, and of 2.
    groups = [FlatGroup(shared, 12, dist.group.WORLD), FlatGroup(own, 8, alone)]
    gradients = FlatGradients(groups, world_size, dtype)
    for value in (rank + 1.0, 10.0):
        for parameter in (shared[0], shared[2], own[0], own[2]):
            parameter.grad = torch.full_like(parameter, value)
            gradients.add(parameter)
    slices = gradients.reduce()
    return slices, all(parameter.grad is None for parameter in (*shared, *own))


@pytest.mark.parametrize(("workers", "dtype"), [(3, torch.float32), (2, torch.bfloat16), (1, torch.bfloat16)])
def test_trap_T22_each_rank_gets_its_slice_of_the_average(ranks: RankPool, workers: int, dtype: torch.dtype) -> None:
    results = ranks.run(averaged, workers, dtype)
    mean = sum(rank + 11 for rank in range(workers)) / workers
    expected = torch.tensor([mean] * 4 + [0.0] * 3 + [mean] + [0.0] * 4)
    assert torch.allclose(torch.cat([slices[0] for slices, _ in results]), expected)
    for rank, (slices, moved) in enumerate(results):
        value = (rank + 11) / workers
        assert moved and all(part.dtype == torch.float32 for part in slices)
        assert torch.allclose(slices[1], torch.tensor([value] * 4 + [0.0] * 3 + [value]))


def twice(rank: int, world_size: int) -> list[float]:
    """Reduce, and begin the next step with another gradient."""
    assert dist.group.WORLD is not None
    parameter = nn.Parameter(torch.ones(2))
    gradients = FlatGradients([FlatGroup([parameter], 2, dist.group.WORLD)], 1, torch.float32)
    found = []
    for value in (1.0, 2.0):
        parameter.grad = torch.full((2,), value)
        gradients.add(parameter)
        found += gradients.reduce()[0].tolist()
    return found + gradients.reduce()[0].tolist()


def test_a_step_does_not_hold_the_gradients_of_the_one_before(ranks: RankPool) -> None:
    assert ranks.run(twice, 1) == [[1.0, 1.0, 2.0, 2.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 1024, BLOCK + 1025])
def test_trap_T24_the_sum_of_squares_is_that_of_fp64(numel: int, dtype: torch.dtype) -> None:
    # Equal values are the worst case: each addition to a large sum is rounded in the same direction.
    tensors = [torch.full((numel,), 1e-4, dtype=dtype), 1e-4 * torch.randn(3, 5)]
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors)
    assert math.isclose(float(sum_of_squares(tensors, "cpu")), expected, rel_tol=1e-12)


@pytest.mark.parametrize("value", [1e20, 1e-30])
def test_the_squares_of_values_that_fp32_holds_are_finite_and_not_zero(value: float) -> None:
    tensor = torch.full((3000,), value)
    assert math.isclose(float(sum_of_squares([tensor], "cpu")), 3000 * float(tensor[0]) ** 2, rel_tol=1e-12)


def test_the_sum_of_squares_of_no_tensor_is_zero_on_the_device() -> None:
    found = sum_of_squares([], "cpu")
    assert found.item() == 0 and found.dtype == torch.float64 and found.shape == ()
    assert sum_of_squares([], "meta").is_meta


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_sum_of_squares_shows_a_value_that_is_not_finite(value: float) -> None:
    tensor = torch.zeros(2 * BLOCK)
    tensor[-1] = value
    assert not math.isfinite(float(sum_of_squares([torch.ones(3), tensor], "cpu")))
