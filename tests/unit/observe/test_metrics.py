"""The records of a step and of an evaluation, from counts made by hand."""

import dataclasses
import math

import pytest
import torch

from dist_moe.balance.load import cov_floor, max_vio_floor
from dist_moe.observe.metrics import evaluation_metrics, measure_load, step_metrics
from tests.unit.observe.samples import evaluation_sample, step_sample

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
}


def test_a_step_measures_layers_with_different_numbers_of_experts() -> None:
    metrics = step_sample()
    assert metrics.load == ((40, 0, 20), (20, 20, 20, 20))
    assert metrics.max_vio_per_layer == pytest.approx((1.0, 0.0))
    assert metrics.load_cov_per_layer == pytest.approx((math.sqrt(2 / 3), 0.0))
    assert metrics.dead_experts == 1
    assert metrics.max_vio == pytest.approx(0.5)
    assert metrics.load_cov == pytest.approx(math.sqrt(2 / 3) / 2)
    first_entropy = (math.log(3) - 2 / 3 * math.log(2)) / math.log(3)
    assert metrics.load_entropy == pytest.approx((first_entropy + 1) / 2)


def test_floors_come_from_each_layers_own_experts_and_assignments() -> None:
    metrics = step_sample()
    assert metrics.max_vio_floor_per_layer == pytest.approx((max_vio_floor(3, 60), max_vio_floor(4, 80)))
    assert metrics.max_vio_floor == pytest.approx((max_vio_floor(3, 60) + max_vio_floor(4, 80)) / 2)
    assert metrics.load_cov_floor == pytest.approx((cov_floor(3, 60) + cov_floor(4, 80)) / 2)


def test_the_range_of_each_bias_and_none_for_a_layer_without() -> None:
    metrics = step_metrics(
        step=1, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens=1, tokens_per_s=1.0, step_ms=1.0,
        load_L=[torch.tensor([1, 1, 1]), torch.tensor([1, 1])],
        bias_L=[torch.tensor([-0.5, 0.25, 0.0]), None],
        balance_rate=0.0, skipped=False, skipped_steps=0,
    )  # fmt: skip
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
    assert metrics.load == metrics.max_vio_per_layer == ()
    assert metrics.dead_experts == 0


def test_an_evaluation_gives_nats_per_token_and_bits_per_byte() -> None:
    metrics = evaluation_sample()
    assert metrics.validation_loss == 2.0
    assert metrics.bits_per_byte == pytest.approx(200 / math.log(2) / 250)
    assert metrics.max_vio_global_per_layer == pytest.approx((1.0, 0.0))
    assert metrics.max_vio_global == pytest.approx(0.5)
    assert metrics.max_vio_global_floor == pytest.approx((max_vio_floor(3, 60) + max_vio_floor(4, 80)) / 2)
    record = metrics.as_dict()
    assert (record["event"], record["tokens"], record["bytes"]) == ("validation", 100, 250)
    assert record["load"] == ((40, 0, 20), (20, 20, 20, 20))


@pytest.mark.parametrize(("tokens", "text_bytes"), [(0, 5), (5, 0)])
def test_an_evaluation_of_nothing_is_refused(tokens: int, text_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"evaluated {tokens} label tokens and {text_bytes} bytes"):
        evaluation_metrics(step=0, total_nats=0.0, tokens=tokens, text_bytes=text_bytes, load_L=[])


def test_trap_T05_counts_are_int64_in_records() -> None:
    big = 2**53 + 1  # a float64 loses the 1
    assert measure_load([torch.tensor([big, 0])]).load == ((big, 0),)
    with pytest.raises(TypeError, match=r"counts are torch\.int64"):
        measure_load([torch.tensor([1.0, 2.0])])


def test_trap_T12_a_bias_that_is_not_float32_is_refused() -> None:
    step = step_sample().as_dict()
    given = {key: step[key] for key in ("step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s")}
    given |= {"step_ms": 1.0, "balance_rate": 0.0, "skipped": False, "skipped_steps": 0}
    load_E = torch.tensor([1, 1])
    with pytest.raises(TypeError, match=r"layer 0 has dtype torch\.bfloat16"):
        step_metrics(**given, load_L=[load_E], bias_L=[torch.zeros(2, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match=r"layer 0 has shape \(3,\), its load \(2,\)"):
        step_metrics(**given, load_L=[load_E], bias_L=[torch.zeros(3)])
    with pytest.raises(ValueError, match="0 biases for 1 loads"):
        step_metrics(**given, load_L=[load_E], bias_L=[])


def test_a_stack_of_layers_is_not_one_layer() -> None:
    with pytest.raises(ValueError, match=r"layer 0 has shape \(2, 3\); it is \[E\]"):
        measure_load([torch.ones(2, 3, dtype=torch.int64)])
