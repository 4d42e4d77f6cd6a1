"""Tests of the records of a step and of an evaluation, from given counts."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from dist_moe.balancing.experts_per_token import experts_per_token_percentile
from dist_moe.balancing.load import (
    cov_floor,
    dead_experts_floor,
    load_deviation_percent_floor,
    load_entropy_floor,
    max_vio_floor,
)
from dist_moe.observe.evaluation import evaluation_metrics
from dist_moe.observe.measures import measure_load, shared_fields
from dist_moe.observe.metrics import step_metrics
from tests.unit.observe.samples import VARYING, evaluation_sample, progress_sample, step_sample

PROMISED_STEP_KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "max_vio",
    "max_vio_floor",
    "load_cov",
    "load_cov_floor",
    "load_entropy",
    "dead_experts",
    "max_vio_per_layer",
    "load_cov_per_layer",
    "load",
    "bias_per_layer",
    "skipped",
    "skipped_steps",
    "step_ms",
    "balance_rate",
    "auxiliary_loss",
    "threshold",
    "load_deviation_percent",
    "load_deviation_percent_floor",
    "load_deviation_percent_per_layer",
    "load_entropy_floor",
    "dead_experts_floor",
    "max_vio_computation",
    "max_vio_computation_floor",
    "max_vio_computation_per_layer",
    "rank_load",
    "rank_load_floor",
    "rank_load_per_layer",
    "rank_load_floor_per_layer",
    "load_cov_floor_per_layer",
    "load_deviation_percent_floor_per_layer",
    "max_vio_computation_floor_per_layer",
    "experts_per_token",
    "experts_per_token_p50",
    "experts_per_token_p99",
    "unrouted_percent",
    "experts_per_token_histogram",
    "experts_per_token_per_layer",
}


def arguments(**other: Any) -> dict[str, Any]:
    """Return the arguments of a step with one layer of two experts, updated by `other`."""
    return {
        "load_L": [torch.tensor([1, 1])],
        "k_histogram_L": [torch.tensor([2])],
        "microbatch_vio_L": [(0.0, 0.5)],
        "bias_L": [None],
        "expert_parallel": 1,
    } | other


def test_a_step_measures_layers_with_different_numbers_of_experts() -> None:
    metrics = step_sample()
    assert metrics.load == ((40, 0, 20), (20, 20, 20, 20))
    assert metrics.max_vio_per_layer == pytest.approx((1.0, 0.0))
    assert metrics.load_cov_per_layer == pytest.approx((math.sqrt(2 / 3), 0.0))
    assert metrics.dead_experts == 1
    assert metrics.max_vio == pytest.approx(0.5)
    assert metrics.load_cov == pytest.approx(math.sqrt(2 / 3) / 2)
    assert metrics.load_deviation_percent_per_layer == pytest.approx((100 * math.sqrt(2 / 3) / 3, 0.0))
    assert metrics.load_deviation_percent == pytest.approx(100 * math.sqrt(2 / 3) / 6)
    first_entropy = (math.log(3) - 2 / 3 * math.log(2)) / math.log(3)
    assert metrics.load_entropy == pytest.approx((first_entropy + 1) / 2)


def test_layers_of_the_same_size_are_measured_together_and_stay_in_their_order() -> None:
    loads = [torch.tensor(load) for load in ([4, 0], [1, 3], [6, 0, 0], [2, 2], [0, 5])]
    together = measure_load(loads)
    for layer, load_E in enumerate(loads):
        alone = measure_load([load_E])
        for field in dataclasses.fields(together):
            assert getattr(together, field.name)[layer] == pytest.approx(getattr(alone, field.name)[0])


def test_floors_come_from_each_layers_own_experts_and_assignments() -> None:
    metrics = step_sample()
    assert metrics.max_vio_floor_per_layer == pytest.approx((max_vio_floor(3, 60), max_vio_floor(4, 80)))
    assert metrics.max_vio_floor == pytest.approx((max_vio_floor(3, 60) + max_vio_floor(4, 80)) / 2)
    assert metrics.load_cov_floor_per_layer == pytest.approx((cov_floor(3, 60), cov_floor(4, 80)))
    assert metrics.load_cov_floor == pytest.approx((cov_floor(3, 60) + cov_floor(4, 80)) / 2)
    deviations = (load_deviation_percent_floor(3, 60), load_deviation_percent_floor(4, 80))
    assert metrics.load_deviation_percent_floor_per_layer == pytest.approx(deviations)
    assert metrics.load_deviation_percent_floor == pytest.approx(sum(deviations) / 2)
    assert metrics.load_entropy_floor == pytest.approx((load_entropy_floor(3, 60) + load_entropy_floor(4, 80)) / 2)
    few = step_sample(loads=([3, 0, 1], [2, 2]))
    assert few.dead_experts_floor == pytest.approx(dead_experts_floor(3, 4) + dead_experts_floor(2, 4)), "a sum"


def test_rank_load_is_measured_per_layer_with_the_floor_of_ranks() -> None:
    loads = [torch.tensor([40, 0, 20, 0]), torch.tensor([5, 5, 10, 10, 10, 40])]
    metrics = step_metrics(
        progress_sample(),
        load_L=loads,
        k_histogram_L=[torch.tensor([60]), torch.tensor([80])],
        microbatch_vio_L=[(0.5, 0.25), (1.5, 0.75)],
        bias_L=[None, None],
        expert_parallel=2,
    )
    assert metrics.rank_load_per_layer == pytest.approx((40 / 30, 60 / 40))
    assert metrics.rank_load == pytest.approx((40 / 30 + 60 / 40) / 2)
    assert metrics.rank_load_floor_per_layer == pytest.approx((1 + max_vio_floor(2, 60), 1 + max_vio_floor(2, 80)))
    assert metrics.rank_load_floor == pytest.approx(1 + (max_vio_floor(2, 60) + max_vio_floor(2, 80)) / 2)
    alone = step_sample()
    assert (alone.rank_load, alone.rank_load_per_layer) == (1.0, (1.0, 1.0))
    assert alone.rank_load_floor == pytest.approx(1.0)


def test_max_vio_computation_is_the_mean_over_layers() -> None:
    metrics = step_sample()
    assert metrics.max_vio_computation_per_layer == (1.5, 2.5)
    assert metrics.max_vio_computation_floor_per_layer == (0.25, 0.25)
    assert (metrics.max_vio_computation, metrics.max_vio_computation_floor) == (2.0, 0.25)


@pytest.mark.parametrize("sample", [step_sample, evaluation_sample])
def test_experts_per_token_over_layers_of_different_k(sample: Any) -> None:
    metrics = sample(k_histograms=VARYING)
    assert metrics.experts_per_token_histogram == (60, 25, 10)
    assert metrics.experts_per_token == pytest.approx((60 + 2 * 25 + 3 * 10) / 95)
    assert (metrics.experts_per_token_p50, metrics.experts_per_token_p99) == (1, 3)
    assert metrics.experts_per_token_per_layer == pytest.approx((60 / 35, 80 / 60))
    constant = sample()
    assert constant.experts_per_token_histogram == (0, 70)
    assert (constant.experts_per_token, constant.experts_per_token_p50, constant.experts_per_token_p99) == (2.0, 2, 2)


def test_trap_T19_tokens_without_experts_count_in_the_experts_per_token() -> None:
    """Layer 0: 5 tokens take none, 10 one, 10 two; layer 1: 15 one."""
    fields = shared_fields(
        measure_load([torch.tensor([15, 15]), torch.tensor([10, 5])]),
        [torch.tensor([10, 10]), torch.tensor([15, 0])],
        [5, 0],
    )
    assert fields["experts_per_token"] == pytest.approx((25 + 20) / 40)
    assert fields["experts_per_token_per_layer"] == pytest.approx((30 / 25, 1.0))
    assert fields["unrouted_percent"] == 12.5
    assert (fields["experts_per_token_p50"], fields["experts_per_token_p99"]) == (1, 2)
    assert experts_per_token_percentile(torch.tensor([10, 10]), 20, 5) == 0, "a fifth of the tokens takes none"
    assert experts_per_token_percentile(torch.tensor([10, 10]), 21, 5) == 1


def test_a_step_is_measured_against_the_shares() -> None:
    found = step_metrics(progress_sample(), **arguments(load_L=[torch.tensor([30, 10])], shares=(0.75, 0.25)))
    assert found.max_vio == found.load_deviation_percent == 0.0 < found.max_vio_floor
    assert (
        found.max_vio_floor
        > step_metrics(progress_sample(), **arguments(load_L=[torch.tensor([30, 10])])).max_vio_floor
    )


def test_a_step_record_has_the_threshold_and_the_auxiliary_loss() -> None:
    record = step_sample(threshold=0.25, auxiliary_loss=0.125).as_dict()
    assert (record["threshold"], record["auxiliary_loss"]) == (0.25, 0.125)
    assert step_sample().threshold is None
    assert list(record)[:3] == ["event", "step", "loss"], "the most important fields come first"


def test_bias_range_is_none_for_a_layer_without_a_bias() -> None:
    metrics = step_metrics(
        progress_sample(),
        load_L=[torch.tensor([1, 1, 1]), torch.tensor([1, 1])],
        k_histogram_L=[torch.tensor([3]), torch.tensor([2])],
        microbatch_vio_L=[(0.0, 0.5)] * 2,
        bias_L=[torch.tensor([-0.5, 0.25, 0.0]), None],
        expert_parallel=1,
    )
    record = metrics.as_dict()
    assert record["bias_per_layer"] == ({"min": -0.5, "max": 0.25, "abs_mean": 0.25}, None)


def test_the_dictionary_of_a_step_has_every_promised_key() -> None:
    record = step_sample().as_dict()
    assert record.keys() >= PROMISED_STEP_KEYS
    assert record["event"] == "step"
    assert (record["tokens"], record["loss"], record["grad_norm"]) == (640, 2.5, 0.75)


def test_records_are_frozen() -> None:
    for record in (step_sample(), evaluation_sample()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.step = 3  # type: ignore[misc]


def test_a_model_without_moe_layers_has_no_balance() -> None:
    metrics = step_sample(loads=())
    assert math.isnan(metrics.max_vio) and math.isnan(metrics.max_vio_floor)
    assert math.isnan(metrics.max_vio_computation) and math.isnan(metrics.rank_load)
    assert metrics.load == metrics.max_vio_per_layer == metrics.experts_per_token_histogram == ()
    assert (metrics.experts_per_token, metrics.experts_per_token_p50, metrics.dead_experts_floor) == (0.0, 0, 0.0)
    assert metrics.dead_experts == 0


def test_an_evaluation_gives_nats_per_token_and_bits_per_byte() -> None:
    metrics = evaluation_sample()
    assert metrics.validation_loss == 2.0
    assert metrics.bits_per_byte == pytest.approx(200 / math.log(2) / 250)
    assert metrics.max_vio_global_per_layer == pytest.approx((1.0, 0.0))
    assert metrics.max_vio_global == pytest.approx(0.5)
    assert metrics.max_vio_global_floor == pytest.approx((max_vio_floor(3, 60) + max_vio_floor(4, 80)) / 2)
    assert metrics.load_cov == pytest.approx(math.sqrt(2 / 3) / 2)
    assert metrics.load_cov_floor == pytest.approx((cov_floor(3, 60) + cov_floor(4, 80)) / 2)
    assert metrics.load_deviation_percent_per_layer == pytest.approx((100 * math.sqrt(2 / 3) / 3, 0.0))
    assert metrics.load_deviation_percent == pytest.approx(100 * math.sqrt(2 / 3) / 6)
    deviations = (load_deviation_percent_floor(3, 60), load_deviation_percent_floor(4, 80))
    assert metrics.load_deviation_percent_floor_per_layer == pytest.approx(deviations)
    assert metrics.load_deviation_percent_floor == pytest.approx(sum(deviations) / 2)
    record = metrics.as_dict()
    assert (record["event"], record["tokens"], record["bytes"]) == ("validation", 100, 250)
    assert record["load"] == ((40, 0, 20), (20, 20, 20, 20))


def test_an_empty_evaluation_is_rejected() -> None:
    with pytest.raises(ValueError, match="evaluated no label token; evaluate more sequences"):
        evaluation_metrics(step=0, total_nats=0.0, tokens=0, text_bytes=5, load_L=[], k_histogram_L=[])


def test_an_evaluation_of_end_tokens_alone_has_a_loss_but_no_bits_per_byte() -> None:
    found = evaluation_metrics(step=0, total_nats=2.0, tokens=4, text_bytes=0, load_L=[], k_histogram_L=[])
    assert found.validation_loss == 0.5 and math.isnan(found.bits_per_byte)


def test_trap_T05_counts_are_int64_in_records() -> None:
    big = 2**53 + 1  # a float64 loses the 1
    assert measure_load([torch.tensor([big, 0])]).load == ((big, 0),)
    with pytest.raises(TypeError, match=r"counts are torch\.int64"):
        measure_load([torch.tensor([1.0, 2.0])])
    with pytest.raises(TypeError, match=r"counts are torch\.int64"):
        step_metrics(progress_sample(), **arguments(k_histogram_L=[torch.tensor([2.0])]))


def test_trap_T12_a_bias_that_is_not_float32_is_refused() -> None:
    with pytest.raises(TypeError, match=r"layer 0 has dtype torch\.bfloat16"):
        step_metrics(progress_sample(), **arguments(bias_L=[torch.zeros(2, dtype=torch.bfloat16)]))
    with pytest.raises(ValueError, match=r"layer 0 has shape \(3,\), its load \(2,\)"):
        step_metrics(progress_sample(), **arguments(bias_L=[torch.zeros(3)]))
    with pytest.raises(ValueError, match="0 biases for 1 loads"):
        step_metrics(progress_sample(), **arguments(bias_L=[]))


def test_values_for_a_different_number_of_layers_are_rejected() -> None:
    with pytest.raises(ValueError, match="0 histograms of experts per token for 1 loads"):
        step_metrics(progress_sample(), **arguments(k_histogram_L=[]))
    with pytest.raises(ValueError, match="microbatch_vio_L has 2 values for 1 loads"):
        step_metrics(progress_sample(), **arguments(microbatch_vio_L=[(0.0, 0.5)] * 2))


def test_a_stack_of_layers_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"layer 0 has shape \(2, 3\); expected \[E\]"):
        measure_load([torch.ones(2, 3, dtype=torch.int64)])
