"""Tests of the event files, read back with TensorBoard's own reader."""

import io
import math
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dist_moe.observe.pictures.load import draw_load
from dist_moe.observe.tensorboard import TensorBoardWriter
from tests.unit.observe.samples import UNEVEN, VARYING, evaluation_sample, step_sample


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_curves_of_steps_are_read_back(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path / "tb") as writer:
        writer.step(step_sample(step=10, loss=2.5))
        writer.step(step_sample(step=20, loss=2.25, loads=([30, 30, 0], [40, 20, 10, 10])))
    events = read(tmp_path / "tb")
    assert scalars(events, "train/loss") == [(10, 2.5), (20, 2.25)]
    assert scalars(events, "train/grad_norm") == [(10, 0.75), (20, 0.75)]
    assert scalars(events, "balance/max_vio") == [(10, 0.5), (20, 0.75)]
    assert scalars(events, "max_vio/layer_00") == [(10, 1.0), (20, 0.5)]
    assert scalars(events, "max_vio/layer_01") == [(10, 0.0), (20, 1.0)]
    assert scalars(events, "bias_min/layer_01") == [(10, -0.25), (20, -0.25)]
    assert scalars(events, "bias_max/layer_00") == [(10, 0.25), (20, 0.25)]
    assert scalars(events, "bias_max/layer_01") == [(10, 0.5), (20, 0.5)]
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/learning_rate", "speed/tokens_per_s", "speed/step_ms", "balance/max_vio_floor"}
    assert tags >= {"balance/load_cov", "balance/load_entropy", "balance/dead_experts", "train/skipped_steps"}


def test_trap_T57_the_curves_and_the_heat_map_of_a_step_are_one_event(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(step=10))
        writer.evaluation(evaluation_sample(step=20))
    (file,) = tmp_path.iterdir()
    events = [(event.step, event.summary.value) for event in LegacyEventFileLoader(str(file)).Load()]
    with_curves = [(step, [value.tag for value in values]) for step, values in events if len(values) > 1]
    assert [step for step, _ in with_curves] == [10, 20]
    assert {"train/loss", "balance/max_vio", "max_vio/layer_01", "bias_max/layer_00", "load/step"} <= set(
        with_curves[0][1]
    )
    assert not [value.tag for step, values in events for value in values[:1] if len(values) == 1 and value.simple_value]


def test_curves_of_evaluations_are_read_back(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.evaluation(evaluation_sample(step=20))
    events = read(tmp_path)
    assert scalars(events, "validation/loss") == [(20, 2.0)]
    assert scalars(events, "validation/bits_per_byte") == [(20, pytest.approx(200 / math.log(2) / 250))]
    assert scalars(events, "validation/max_vio_global") == [(20, 0.5)]
    assert scalars(events, "max_vio_global/layer_00") == [(20, 1.0)]
    metrics = evaluation_sample(step=20)
    names = ["load_cov", "load_deviation_percent", "load_cov_floor", "load_deviation_percent_floor"]
    names += ["experts_per_token", "experts_per_token_p50", "experts_per_token_p99"]
    for name in names:
        assert scalars(events, f"validation/{name}") == [(20, pytest.approx(getattr(metrics, name)))]
    deviation = metrics.load_deviation_percent_per_layer[0]
    assert scalars(events, "load_deviation_percent_global/layer_00") == [(20, pytest.approx(deviation))]
    assert scalars(events, "experts_per_token_global/layer_01") == [(20, 2.0)]


def test_every_balance_figure_of_a_step_has_its_own_curve(tmp_path: Path) -> None:
    metrics = step_sample(
        loads=([3, 0, 1], [20, 20, 10, 10]), k_histograms=VARYING, threshold=0.25, auxiliary_loss=0.125
    )
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(metrics)
    events = read(tmp_path)
    names = {tag.partition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith("balance/")}
    with_floor = {"max_vio", "max_vio_computation", "load_cov", "load_deviation_percent", "load_entropy"}
    with_floor |= {"dead_experts", "rank_load"}
    alone = {"experts_per_token", "experts_per_token_p50", "experts_per_token_p99", "threshold"}
    assert names == with_floor | {f"{name}_floor" for name in with_floor} | alone | {"rate"}
    for name in names - {"rate"}:
        assert scalars(events, f"balance/{name}") == [(10, pytest.approx(getattr(metrics, name)))]
    measured = ("max_vio", "max_vio_computation", "load_deviation_percent", "rank_load")
    for group in (*measured, *(f"{name}_floor" for name in measured), "experts_per_token"):
        for layer, value in enumerate(getattr(metrics, f"{group}_per_layer")):
            assert scalars(events, f"{group}/layer_{layer:02d}") == [(10, pytest.approx(value))]
    assert scalars(events, "train/auxiliary_loss") == [(10, 0.125)]


def test_without_threshold_routing_there_is_no_curve_of_it(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample())
    assert "balance/threshold" not in read(tmp_path).Tags()["scalars"]


def test_the_histogram_of_experts_per_token_has_a_bar_for_each_number(tmp_path: Path) -> None:
    nothing = ([0, 0, 0], [0, 0])
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(step=10, k_histograms=VARYING))
        writer.step(step_sample(step=20))
        writer.step(step_sample(step=30, k_histograms=nothing))
        writer.evaluation(evaluation_sample(step=20, k_histograms=VARYING))
    events = read(tmp_path)
    varying, constant = events.Histograms("experts_per_token/step")
    (validation,) = events.Histograms("experts_per_token/validation")
    assert validation.histogram_value == varying.histogram_value
    found = varying.histogram_value
    assert (varying.step, found.min, found.max, found.num, found.sum) == (10, 1, 3, 95, 140)
    assert found.sum_squares == 60 + 4 * 25 + 9 * 10
    assert dict(zip(found.bucket_limit, found.bucket, strict=True)) == {1.5: 60, 2.5: 25, 3.5: 10}
    found = constant.histogram_value
    assert (constant.step, found.min, found.max, found.num, found.sum) == (20, 2, 2, 70, 140)


def test_every_chart_with_a_floor_draws_curves_that_are_written(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample())
        writer.evaluation(evaluation_sample())
    events = read(tmp_path)
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
    assert len(charts) == 9
    assert {tag for chart in charts for tag in chart} <= set(events.Tags()["scalars"])
    assert all(floor == f"{tag}_floor" for tag, floor in charts)


def test_the_heat_maps_of_the_load_are_read_back_pixel_by_pixel(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(step=10))
        writer.evaluation(evaluation_sample(step=20))
    events = read(tmp_path)
    for tag, step in (("load/step", 10), ("load/validation", 20)):
        (image,) = events.Images(tag)
        assert image.step == step
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        assert np.array_equal(pixels, draw_load(UNEVEN).pixels)


def test_hyperparameters_are_in_the_event_file_of_the_run(tmp_path: Path) -> None:
    config = {
        "train": {"learning_rate": 0.25, "optimizer": "adamw"},
        "data": {"sources": ["a", "b"]},
        "gap": None,
    }
    with TensorBoardWriter(tmp_path) as writer:
        writer.hyper_parameters(config, "train:\n  learning_rate: 0.25\n")
        writer.step(step_sample())
    assert len(list(tmp_path.iterdir())) == 1
    events = read(tmp_path)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["train.learning_rate"].number_value == 0.25
    assert found["train.optimizer"].string_value == "adamw"
    assert found["data.sources"].string_value == "['a', 'b']"
    assert "gap" not in found
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "      learning_rate: 0.25" in text


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.step(step_sample(step=step, loss=1.0))
    time.sleep(1)  # files are read in the order of their names, which begin with the second
    with TensorBoardWriter(tmp_path, resumed_step=20) as writer:
        writer.step(step_sample(step=30, loss=3.0))
    assert scalars(read(tmp_path), "train/loss") == [(10, 1.0), (20, 1.0), (30, 3.0)]


def test_a_model_without_moe_layers_has_losses_and_no_heat_map(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(loads=()))
        writer.evaluation(evaluation_sample(loads=()))
    tags = read(tmp_path).Tags()
    assert {"train/loss", "validation/loss"} <= set(tags["scalars"])
    assert not tags["images"] and not [tag for tag in tags["scalars"] if "max_vio" in tag]


def test_writing_outside_the_context_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is not open"):
        TensorBoardWriter(tmp_path).step(step_sample())
