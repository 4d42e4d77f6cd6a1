"""The event files that TensorBoard reads, read back with TensorBoard's own reader."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dist_moe.observe.heatmap import draw_load
from dist_moe.observe.tensorboard import TensorBoardWriter
from tests.unit.observe.samples import UNEVEN, evaluation_sample, step_sample


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
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


def test_curves_of_evaluations_are_read_back(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.evaluation(evaluation_sample(step=20))
    events = read(tmp_path)
    assert scalars(events, "validation/loss") == [(20, 2.0)]
    assert scalars(events, "validation/bits_per_byte") == [(20, pytest.approx(200 / math.log(2) / 250))]
    assert scalars(events, "validation/max_vio_global") == [(20, 0.5)]
    assert scalars(events, "max_vio_global/layer_00") == [(20, 1.0)]


def test_the_pictures_of_the_load_are_read_back_pixel_by_pixel(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(step=10))
        writer.evaluation(evaluation_sample(step=20))
    events = read(tmp_path)
    for tag, step in (("load/step", 10), ("load/validation", 20)):
        (image,) = events.Images(tag)
        assert image.step == step
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        assert np.array_equal(pixels, draw_load(UNEVEN))


def test_hyper_parameters_stand_in_the_runs_own_file(tmp_path: Path) -> None:
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
    with TensorBoardWriter(tmp_path, resumed_step=20) as writer:
        writer.step(step_sample(step=30, loss=3.0))
    assert scalars(read(tmp_path), "train/loss") == [(10, 1.0), (20, 1.0), (30, 3.0)]


def test_a_model_without_moe_layers_has_losses_and_no_picture(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(loads=()))
        writer.evaluation(evaluation_sample(loads=()))
    tags = read(tmp_path).Tags()
    assert {"train/loss", "validation/loss"} <= set(tags["scalars"])
    assert not tags["images"] and not [tag for tag in tags["scalars"] if "max_vio" in tag]


def test_writing_outside_the_context_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is not open"):
        TensorBoardWriter(tmp_path).step(step_sample())
