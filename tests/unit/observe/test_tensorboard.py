"""Tests of the event files, read back with TensorBoard's own reader."""

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dist_moe.observe.cards import CARDS, DESCRIPTIONS, GUIDE, hyper_parameters
from dist_moe.observe.pictures.load import draw_experts_over_steps, draw_layers_over_steps, draw_load
from dist_moe.observe.pictures.over_steps import LoadOverSteps
from dist_moe.observe.tensorboard import TensorBoardWriter
from tests.unit.observe.samples import UNEVEN, VARYING, evaluation_sample, step_sample

NO_DISTRIBUTIONS: dict[str, np.ndarray] = {}


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def text(events: EventAccumulator, tag: str) -> str:
    found: str = events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
    return found


def whole_run(folder: Path, layers: int, experts: int = 8, steps: int = 3) -> None:
    """Write all that a run of a model with MoE layers writes."""
    load = [[10 + expert for expert in range(experts)] for _ in range(layers)]
    with TensorBoardWriter(folder) as writer:
        writer.describe({"run": {"seed": 0}}, "run:\n  seed: 0\n")
        for step in range(1, steps + 1):
            writer.step(step_sample(step=step, loads=load))
        writer.pictures(step_sample(step=steps, loads=load), {"selection_bias": np.ones((layers, experts))})
        writer.checkpoint(steps, 2.0)
        writer.evaluation(evaluation_sample(step=steps, loads=load))


def test_the_curves_of_steps_and_their_floors_are_read_back(tmp_path: Path) -> None:
    first, second = step_sample(step=10), step_sample(step=20, loss=2.25, loads=([30, 30, 0], [40, 20, 10, 10]))
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(first)
        writer.step(second)
    values, floors = read(tmp_path), read(tmp_path / "floor")
    assert scalars(values, "1_overview/loss") == [(10, 2.5), (20, 2.25)]
    assert scalars(values, "1_overview/max_vio") == [(10, 0.5), (20, 0.75)]
    assert scalars(values, "1_overview/max_vio_worst_layer") == [(10, 1.0), (20, 1.0)]
    assert scalars(values, "3_details/bias_largest") == [(10, 0.5), (20, 0.5)]
    measured = ("max_vio", "max_vio_computation", "load_deviation_percent", "dead_experts")
    for name in measured:
        tag = f"{'1_overview' if name == 'max_vio' else '3_details'}/{name}"
        for metrics, value, floor in zip((first, second), scalars(values, tag), scalars(floors, tag), strict=True):
            assert value[0] == floor[0] == metrics.step
            assert value[1] == pytest.approx(getattr(metrics, name))
            assert floor[1] == pytest.approx(getattr(metrics, f"{name}_floor"))
    worst = [metrics.max_vio_floor_per_layer[layer] for metrics, layer in ((first, 0), (second, 1))]
    assert [value for _, value in scalars(floors, "1_overview/max_vio_worst_layer")] == pytest.approx(worst)


def test_the_points_of_an_evaluation_are_in_the_cards_of_the_steps(tmp_path: Path) -> None:
    metrics = evaluation_sample(step=20, loads=([3, 0, 1], [20, 20, 10, 10]))
    with TensorBoardWriter(tmp_path) as writer:
        writer.evaluation(metrics)
    events = read(tmp_path / "validation")
    assert scalars(events, "1_overview/loss") == [(20, 2.0)]
    assert scalars(events, "1_overview/max_vio") == [(20, pytest.approx(metrics.max_vio_global))]
    assert scalars(events, "1_overview/max_vio_worst_layer") == [(20, pytest.approx(1.25))]
    assert scalars(events, "3_details/bits_per_byte") == [(20, pytest.approx(metrics.bits_per_byte))]
    assert scalars(events, "3_details/load_deviation_percent") == [(20, pytest.approx(metrics.load_deviation_percent))]


def test_the_metrics_of_labeled_texts_are_in_the_overview(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.evaluation(replace(evaluation_sample(step=20), accuracy=0.75, macro_f1=0.5))
    events = read(tmp_path / "validation")
    assert scalars(events, "1_overview/accuracy") == [(20, 0.75)]
    assert scalars(events, "1_overview/macro_f1") == [(20, 0.5)]
    tags = events.Tags()["scalars"]
    assert "1_overview/loss" in tags and "1_overview/pearson" not in tags and "3_details/bits_per_byte" not in tags


@pytest.mark.parametrize("layers", [3, 60])
def test_trap_T74_the_number_of_cards_does_not_grow_with_the_layers(tmp_path: Path, layers: int) -> None:
    whole_run(tmp_path, layers)
    cards: dict[str, set[str]] = {"scalars": set(), "images": set(), "histograms": set(), "tensors": set()}
    for folder in (tmp_path, tmp_path / "floor", tmp_path / "validation"):
        for kind, tags in read(folder).Tags().items():
            if kind in cards:
                cards[kind] |= set(tags)
    # Without skipped steps and with one rank, there is no card of these.
    assert len(cards["scalars"]) == 13 and not cards["scalars"] & {"3_details/skipped_steps", "3_details/rank_load"}
    assert len(cards["images"]) == min(layers, 4) + 3 and len(cards["histograms"]) == 1
    assert {tag.partition("/")[0] for tag in cards["tensors"]} == {"1_guide", "2_layers", "3_config", "_hparams_"}
    first = sorted({tag.partition("/")[0] for tag in cards["scalars"] | cards["images"]})
    assert first == ["1_overview", "2_load_pictures", "3_details"]
    overview = sorted(tag.partition("/")[2] for tag in cards["scalars"] if tag.startswith("1_overview"))
    assert overview == ["loss", "max_vio", "max_vio_worst_layer", "tokens_per_s"]


def test_every_card_is_explained(tmp_path: Path) -> None:
    whole_run(tmp_path, 3)
    for folder in (tmp_path, tmp_path / "floor", tmp_path / "validation"):
        events = read(folder)
        for tag in (tag for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]):
            assert events.summary_metadata[tag].summary_description == DESCRIPTIONS[tag]
    assert len({card.description for card in CARDS}) == len(CARDS)
    assert text(read(tmp_path), "1_guide") == GUIDE
    for card in CARDS:
        if "`floor`" in card.description:
            assert f"`{card.tag.partition('/')[2]}`" in GUIDE


def test_the_table_of_layers_has_every_value_with_its_floor(tmp_path: Path) -> None:
    metrics = step_sample(step=10, loads=([40, 0, 20], [20, 20, 20, 20]))
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(metrics)
        writer.pictures(metrics, NO_DISTRIBUTIONS)
    lines = text(read(tmp_path), "2_layers").splitlines()
    cells = [cell.strip() for cell in lines[-2].strip("|").split("|")]
    assert cells[0] == "0" and cells[1] == f"1.000 ({metrics.max_vio_floor_per_layer[0]:.3f})"
    assert cells[2] == "1.500 (0.250)" and cells[6] == "1: 0.00, 0: 2.00" and cells[7] == "-0.2500 to 0.2500"
    assert lines[-1].startswith("| 1 | 0.000 (")


def test_trap_T57_the_curves_of_a_step_are_one_event(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(step=10))
        writer.evaluation(evaluation_sample(step=20))
    for folder, step in ((tmp_path, 10), (tmp_path / "floor", 10), (tmp_path / "validation", 20)):
        (file,) = (path for path in folder.iterdir() if path.is_file())
        events = [(event.step, event.summary.value) for event in LegacyEventFileLoader(str(file)).Load()]
        with_curves = [step for step, values in events for value in values[:1] if value.HasField("simple_value")]
        assert with_curves == [step]


def test_without_threshold_routing_there_is_no_curve_of_it(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path / "top_k") as writer:
        writer.step(step_sample())
    with TensorBoardWriter(tmp_path / "threshold") as writer:
        writer.step(step_sample(k_histograms=VARYING, threshold=0.25, auxiliary_loss=0.125))
        writer.pictures(step_sample(k_histograms=VARYING, threshold=0.25), NO_DISTRIBUTIONS)
    of_top_k, of_threshold = (read(tmp_path / name) for name in ("top_k", "threshold"))
    added = {"3_details/threshold", "3_details/experts_per_token", "3_details/auxiliary_loss"}
    assert set(of_threshold.Tags()["scalars"]) - set(of_top_k.Tags()["scalars"]) == added
    assert scalars(of_threshold, "3_details/threshold") == [(10, 0.25)]
    (found,) = of_threshold.Histograms("4_distributions/experts_per_token")
    value = found.histogram_value
    assert (found.step, value.min, value.max, value.num, value.sum) == (10, 1, 3, 95, 140)
    assert dict(zip(value.bucket_limit, value.bucket, strict=True)) == {1.5: 60, 2.5: 25, 3.5: 10}


def test_tokens_without_an_expert_have_a_curve(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(replace(step_sample(), unrouted_percent=12.5))
    assert scalars(read(tmp_path), "3_details/unrouted_percent") == [(10, 12.5)]


def test_with_target_shares_pictures_and_table_are_relative_to_the_targets(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path, target_shares=lambda experts: (0.4, 0.3, 0.2, 0.1)) as writer:
        writer.step(step_sample(loads=([40, 30, 20, 10],)))
        writer.pictures(step_sample(loads=([40, 30, 20, 10],)), NO_DISTRIBUTIONS)
    events = read(tmp_path)
    (image,) = events.Images("2_load_pictures/last_step")
    picture = draw_load(
        [[40, 30, 20, 10]], "Load of each expert in each MoE layer, in step 10", lambda _: (0.4, 0.3, 0.2, 0.1)
    )
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")), picture.pixels)
    table = events.Tensors("2_layers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "load / target" in table and "0: 1.00, 0: 1.00" in table


def test_a_distribution_has_all_its_values(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 100))
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample())
        writer.pictures(step_sample(), {"router_scores": values, "selection_bias": np.zeros(0)})
    events = read(tmp_path)
    assert events.Tags()["histograms"] == ["4_distributions/router_scores"]
    (found,) = events.Histograms("4_distributions/router_scores")
    histogram = found.histogram_value
    assert histogram.num == sum(histogram.bucket) == 300
    assert (histogram.min, histogram.max) == (values.min(), values.max())
    below = sum(count for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True) if limit < 0)
    assert abs(below - (values < 0).sum()) < 20


def test_the_pictures_of_the_load_are_read_back_pixel_by_pixel(tmp_path: Path) -> None:
    history = LoadOverSteps()
    with TensorBoardWriter(tmp_path) as writer:
        writer.recall([(5, UNEVEN)])
        for step, loads in ((10, ([0, 60, 0], [20, 20, 20, 20])), (20, UNEVEN)):
            writer.step(step_sample(step=step, loads=loads))
        writer.step(step_sample(step=30, loads=([60, 0, 0], [80, 0, 0, 0]), skipped=True))
        writer.pictures(step_sample(step=20), NO_DISTRIBUTIONS)
        writer.evaluation(evaluation_sample(step=20))
    for step, loads in ((5, UNEVEN), (10, ([0, 60, 0], [20, 20, 20, 20])), (20, UNEVEN)):
        history.add(step, loads)
    expected = {
        "experts_over_steps_1": draw_experts_over_steps(history, 0),
        "experts_over_steps_2": draw_experts_over_steps(history, 1),
        "layers_over_steps": draw_layers_over_steps(history),
        "last_step": draw_load(UNEVEN, "Load of each expert in each MoE layer, in step 20"),
        "validation": draw_load(UNEVEN, "Load over the validation text, after step 20"),
    }
    events = read(tmp_path)
    for name, picture in expected.items():
        (image,) = events.Images(f"2_load_pictures/{name}")
        assert image.step == 20
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        assert np.array_equal(pixels, picture.pixels), name


def test_the_table_of_runs_has_the_fields_that_users_change(tmp_path: Path) -> None:
    config = {
        "train": {"learning_rate": 0.25, "optimizer": "adamw"},
        "balance": {"policy": "none", "rate": None},
        "run": {"seed": 3},
        "kubernetes": {"image": "x"},
    }
    with TensorBoardWriter(tmp_path) as writer:
        writer.describe(config, "train:\n  learning_rate: 0.25\n")
        writer.step(step_sample())
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 1
    events = read(tmp_path)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in found.items()} == {
        "train.learning_rate": 0.25,
        "balance.policy": "none",
        "run.seed": 3,
    }
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    results = HParamsPluginData.FromString(content).experiment.metric_infos
    names = {(result.name.tag, result.name.group) for result in results}
    assert ("1_overview/loss", "validation") in names and len(names) == 5
    assert "      learning_rate: 0.25" in text(events, "3_config")


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.step(step_sample(step=step, loss=1.0))
    time.sleep(1)  # files are read in the order of their names, which begin with the second
    with TensorBoardWriter(tmp_path, resumed_step=20) as writer:
        writer.step(step_sample(step=30, loss=3.0))
    assert scalars(read(tmp_path), "1_overview/loss") == [(10, 1.0), (20, 1.0), (30, 3.0)]
    assert [step for step, _ in scalars(read(tmp_path / "floor"), "1_overview/max_vio")] == [10, 20, 30]


def test_a_model_without_moe_layers_has_losses_and_no_picture(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(step_sample(loads=()))
        writer.pictures(step_sample(loads=()), NO_DISTRIBUTIONS)
        writer.evaluation(evaluation_sample(loads=()))
    tags = read(tmp_path).Tags()
    assert "1_overview/loss" in tags["scalars"] and "1_overview/loss" in read(tmp_path / "validation").Tags()["scalars"]
    assert not tags["images"] and not [tag for tag in tags["scalars"] if "max_vio" in tag]
    assert not (tmp_path / "floor").exists()


def test_writing_outside_the_context_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is not open"):
        TensorBoardWriter(tmp_path).step(step_sample())


def test_what_is_constant_without_a_reason_has_no_card(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.step(replace(step_sample(), rank_load=1.25, rank_load_floor=1.01, skipped_steps=2))
    events = read(tmp_path)
    assert scalars(events, "3_details/rank_load") == [(10, 1.25)]
    assert scalars(events, "3_details/skipped_steps") == [(10, 2.0)]
    assert [value for _, value in scalars(read(tmp_path / "floor"), "3_details/rank_load")] == [pytest.approx(1.01)]


def test_the_table_of_runs_has_what_differs_from_the_defaults(tmp_path: Path) -> None:
    given = {"router": {"selection": "threshold", "threshold": 0.3}, "balance": {"policy": "none"}}
    config = {**given, "observe": {"interval": 3}, "run": {"seed": 0, "dir": "x"}}
    assert hyper_parameters(config) == {
        "balance.policy": "none",
        "run.seed": 0,
        "router.selection": "threshold",
        "router.threshold": 0.3,
    }
