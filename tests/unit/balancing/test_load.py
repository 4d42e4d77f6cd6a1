"""The measures of the load: on matrices made by hand, against a slow twin, and against uniform draws."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.balancing.load import (
    cov_floor,
    dead_experts,
    dead_experts_floor,
    load_cov,
    load_deviation_percent,
    load_deviation_percent_floor,
    load_entropy,
    load_entropy_floor,
    max_vio,
    max_vio_floor,
    mean_max_vio,
    rank_load,
)


def load_of_two_ranks(load_LE: Tensor) -> Tensor:
    """`rank_load` where two ranks hold the experts, or one, if they are not even in number."""
    return rank_load(load_LE, 2 if load_LE.dim() and load_LE.shape[-1] % 2 == 0 else 1)


MEASURES = [max_vio, load_cov, load_deviation_percent, load_entropy, dead_experts, load_of_two_ranks]
FLOORS = [max_vio_floor, cov_floor, load_deviation_percent_floor, load_entropy_floor, dead_experts_floor]

# Rows and columns differ, so that a reduction over the layers gives other numbers or another length.
HAND_LE = torch.tensor([[4, 0, 0], [2, 2, 2], [1, 1, 4], [0, 0, 0]])


def test_trap_T19_metrics_over_the_right_axis() -> None:
    assert max_vio(HAND_LE).tolist() == pytest.approx([2.0, 0.0, 1.0, 0.0])
    assert load_cov(HAND_LE).tolist() == pytest.approx([math.sqrt(2), 0.0, math.sqrt(2) / 2, 0.0])
    # Shares of 100, 0 and 0 per cent deviate from a third by the root of (66.7^2 + 2 * 33.3^2) / 3.
    assert load_deviation_percent(HAND_LE).tolist() == pytest.approx([47.1405, 0.0, 23.5702, 0.0], abs=1e-4)
    entropy_third = -(2 / 6 * math.log(1 / 6) + 4 / 6 * math.log(4 / 6)) / math.log(3)
    assert load_entropy(HAND_LE).tolist() == pytest.approx([0.0, 1.0, entropy_third, 1.0])
    assert dead_experts(HAND_LE).tolist() == [2, 0, 0, 3]


def test_trap_T19_metrics_over_the_right_axis_where_there_are_as_many_layers_as_experts() -> None:
    square_LE = torch.tensor([[6, 0], [3, 3]])
    assert max_vio(square_LE).tolist() == [1.0, 0.0]
    assert load_cov(square_LE).tolist() == [1.0, 0.0]
    assert load_deviation_percent(square_LE).tolist() == [50.0, 0.0]
    assert rank_load(square_LE, 2).tolist() == [2.0, 1.0]
    assert load_entropy(square_LE).tolist() == [0.0, 1.0]
    assert dead_experts(square_LE).tolist() == [1, 0]


def test_trap_T19_the_load_of_ranks_is_that_of_blocks_of_experts_in_order() -> None:
    load_LE = torch.tensor([[4, 2, 1, 1, 0, 4], [1, 3, 3, 1, 2, 2], [0, 0, 0, 0, 0, 0]])
    assert rank_load(load_LE, 2).tolist() == pytest.approx([7 / 6, 7 / 6, 1.0])
    assert rank_load(load_LE, 3).tolist() == pytest.approx([6 / 4, 1.0, 1.0]), "experts 0 and 1, 2 and 3, 4 and 5"
    assert rank_load(load_LE, 6).tolist() == pytest.approx([2.0, 1.5, 1.0])
    assert rank_load(load_LE, 1).tolist() == [1.0, 1.0, 1.0]
    for ranks in (0, 4):
        with pytest.raises(ValueError, match=f"ranks={ranks} does not divide 6 experts"):
            rank_load(load_LE, ranks)


def test_trap_T19_batches_are_measured_before_they_are_averaged() -> None:
    load_ME = torch.tensor([[4, 0, 0], [0, 4, 0], [2, 2, 2], [0, 0, 0]])
    value, floor = mean_max_vio(load_ME)
    assert value == pytest.approx((2.0 + 2.0 + 0.0 + 0.0) / 4), "their sum, 6, 6, 2, has 2 / 7"
    assert floor == pytest.approx((2 * max_vio_floor(3, 4) + max_vio_floor(3, 6)) / 4)


def test_trap_T05_counts_are_int64_and_one_assignment_in_2_to_the_25_shows() -> None:
    load_E = torch.tensor([2**25 + 1, 2**25])
    assert load_E.float()[0] == load_E.float()[1], "float32 cannot distinguish these counts"
    assert float(max_vio(load_E)) == pytest.approx(0.5 / (2**25 + 0.5), rel=1e-6)
    assert float(load_cov(load_E)) == pytest.approx(0.5 / (2**25 + 0.5), rel=1e-6)
    assert max_vio(load_E).dtype == load_cov(load_E).dtype == load_entropy(load_E).dtype == torch.float64
    assert dead_experts(load_E).dtype == torch.int64


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_trap_T05_counts_are_int64_or_refused(measure: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"{dtype}; counts are torch\.int64"):
        measure(torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_malformed_load_is_refused(measure: Callable[[Tensor], Tensor]) -> None:
    for shape in ((), (2, 3, 4), (0,), (3, 0)):
        with pytest.raises(ValueError, match=r"it is \[E\] or \[L, E\]"):
            measure(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="holds -3; a count is never negative"):
        measure(torch.tensor([1, -3]))


def test_a_model_without_layers_has_no_measures() -> None:
    for measure in MEASURES:
        assert measure(torch.zeros(0, 4, dtype=torch.int64)).shape == (0,)


def test_one_expert_is_always_even() -> None:
    one_E = torch.tensor([7])
    assert [float(measure(one_E)) for measure in MEASURES] == [0.0, 0.0, 0.0, 1.0, 0.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=9))
def test_measures_agree_with_a_slow_twin(counts: list[int]) -> None:
    load_E = torch.tensor(counts)
    total, mean = sum(counts), sum(counts) / len(counts)
    if total == 0:
        expected = [0.0, 0.0, 1.0]
    else:
        variance = sum((count - mean) ** 2 for count in counts) / len(counts)
        shares = [count / total for count in counts if count]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(len(counts))
        expected = [(max(counts) - mean) / mean, math.sqrt(variance) / mean, entropy]
    found = [float(measure(load_E)) for measure in (max_vio, load_cov, load_entropy)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert int(dead_experts(load_E)) == counts.count(0)
    shares = [count / total if total else 1 / len(counts) for count in counts]
    deviation = math.sqrt(sum((share - 1 / len(counts)) ** 2 for share in shares) / len(counts))
    assert float(load_deviation_percent(load_E)) == pytest.approx(100 * deviation, rel=1e-9, abs=1e-7)
    assert float(rank_load(load_E, len(counts))) == pytest.approx(1 + expected[0], rel=1e-9)
    stacked_LE = torch.stack([load_E, load_E.flip(0)])
    assert max_vio(stacked_LE).tolist() == pytest.approx([expected[0]] * 2, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("experts", "assignments", "floor"),
    [(8, 2 * 1024, 0.090), (8, 2 * 4096, 0.045), (8, 2 * 16384, 0.022), (64, 6 * 2048, 0.173)],
)
def test_the_floor_of_max_vio_is_the_published_one(experts: int, assignments: int, floor: float) -> None:
    assert max_vio_floor(experts, assignments) == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize(("experts", "assignments"), [(2, 4096), (8, 2048), (64, 12288)])
def test_floors_are_what_uniform_routing_shows(experts: int, assignments: int) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(experts, (600, assignments), generator=generator)
    load_LE = torch.stack([torch.bincount(row, minlength=experts) for row in drawn])
    # 600 batches leave an error of 3 % (2 experts) or less; the formula's own is below 3 %.
    assert max_vio_floor(experts, assignments) == pytest.approx(float(max_vio(load_LE).mean()), rel=0.06)
    root_mean_square = float(load_cov(load_LE).square().mean().sqrt())
    assert cov_floor(experts, assignments) == pytest.approx(root_mean_square, rel=0.06)
    root_mean_square = float(load_deviation_percent(load_LE).square().mean().sqrt())
    assert load_deviation_percent_floor(experts, assignments) == pytest.approx(root_mean_square, rel=0.06)
    # Half of what is lost is the square of a CoV; with 2 experts, one square, it spreads by sqrt(2 / 600) = 6 %.
    lost = 1 - float(load_entropy(load_LE).mean())
    assert 1 - load_entropy_floor(experts, assignments) == pytest.approx(lost, rel=0.15)


@pytest.mark.parametrize(("experts", "assignments", "dead"), [(8, 16, 0.945), (64, 128, 8.526), (4, 1, 3.0)])
def test_the_floor_of_dead_experts_is_what_uniform_routing_shows(experts: int, assignments: int, dead: float) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(experts, (2000, assignments), generator=generator)
    load_LE = torch.stack([torch.bincount(row, minlength=experts) for row in drawn])
    assert dead_experts_floor(experts, assignments) == pytest.approx(dead, abs=1e-3)
    assert dead_experts_floor(experts, assignments) == pytest.approx(float(dead_experts(load_LE).double().mean()), 0.03)


def test_floors_at_the_edges() -> None:
    # The larger of two standard normals is 1 / sqrt(pi) on average, and one alone is 0.
    assert max_vio_floor(2, 2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-6)
    assert max_vio_floor(1, 100) == pytest.approx(0.0, abs=1e-9)
    assert max_vio_floor(8, 0) == cov_floor(8, 0) == cov_floor(1, 100) == load_deviation_percent_floor(8, 0) == 0.0
    assert load_entropy_floor(8, 0) == load_entropy_floor(1, 100) == 1.0, "as the measure has it"
    assert load_entropy_floor(8, 1) == 0.0, "the first order alone would be negative"
    assert load_entropy_floor(8, 70) == pytest.approx(1 - 7 / (2 * 70 * math.log(8)))
    assert (dead_experts_floor(8, 0), dead_experts_floor(1, 0), dead_experts_floor(1, 5)) == (8.0, 1.0, 0.0)
    for floor in FLOORS:
        with pytest.raises(ValueError, match="experts=0; a layer has at least 1"):
            floor(0, 10)
        with pytest.raises(ValueError, match="assignments=-1; it is at least 0"):
            floor(8, -1)


SHARES = (0.5, 0.3, 0.15, 0.05)


def test_trap_T80_measures_against_shares_by_hand() -> None:
    """Of 100 assignments the targets are 50, 30, 15, 5; the errors are -10, 0, 0 and 10, relative -1/5, 0, 0 and 2."""
    load_E = torch.tensor([40, 30, 15, 15])
    assert float(max_vio(load_E, SHARES)) == pytest.approx(2.0)
    assert float(load_cov(load_E, SHARES)) == pytest.approx(math.sqrt((0.04 + 4) / 4))
    assert float(load_deviation_percent(load_E, SHARES)) == pytest.approx(100 * math.sqrt(0.02 / 4))
    divergence = 0.4 * math.log(0.4 / 0.5) + 0.15 * math.log(0.15 / 0.05)
    assert float(load_entropy(load_E, SHARES)) == pytest.approx(1 - divergence / math.log(4))
    exact_E = torch.tensor([50, 30, 15, 5])
    assert [float(measure(exact_E, SHARES)) for measure in (max_vio, load_cov, load_deviation_percent)] == [0.0] * 3
    assert float(load_entropy(exact_E, SHARES)) == pytest.approx(1.0)
    assert float(max_vio(torch.zeros(4, dtype=torch.int64), SHARES)) == 0.0
    values, floor = mean_max_vio(torch.stack([load_E, exact_E]), SHARES)
    assert (values, floor) == pytest.approx((1.0, max_vio_floor(4, 100, SHARES)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=8))
def test_measures_against_equal_shares_are_those_without(counts: list[int]) -> None:
    load_E, shares = torch.tensor(counts), (1 / len(counts),) * len(counts)
    for measure in (max_vio, load_cov, load_deviation_percent, load_entropy):
        assert float(measure(load_E, shares)) == pytest.approx(float(measure(load_E)), rel=1e-9, abs=1e-9)
    for floor in (max_vio_floor, cov_floor, load_deviation_percent_floor, dead_experts_floor):
        assert floor(len(counts), 500, shares) == pytest.approx(floor(len(counts), 500), rel=1e-5)


def test_trap_T80_floors_of_shares_are_what_random_routing_with_these_probabilities_shows() -> None:
    weights = torch.tensor(SHARES, dtype=torch.float64).expand(600, -1)
    drawn = torch.multinomial(weights, 4096, replacement=True, generator=torch.Generator().manual_seed(1))
    load_LE = torch.stack([torch.bincount(row, minlength=4) for row in drawn])
    found = float(max_vio(load_LE, SHARES).mean())
    assert max_vio_floor(4, 4096, SHARES) == pytest.approx(found, rel=0.08)
    assert max_vio_floor(4, 4096) < found / 1.3, "the floor of equal shares is another one"
    squares = (float(measure(load_LE, SHARES).square().mean()) for measure in (load_cov, load_deviation_percent))
    floors = (cov_floor(4, 4096, SHARES), load_deviation_percent_floor(4, 4096, SHARES))
    assert floors == pytest.approx([math.sqrt(square) for square in squares], rel=0.06)


def test_shares_for_another_number_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 shares for 3 experts"):
        max_vio(torch.tensor([1, 2, 3]), (0.5, 0.5))
