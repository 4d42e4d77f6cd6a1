"""TensorBoard's files of the load, read back with its own reader."""

import time
from pathlib import Path

import pytest
import torch

from dist_moe.attach.load import Load
from dist_moe.attach.writer import LoadWriter
from dist_moe.balancing.counts import RoutingCounts
from dist_moe.errors import UserError
from tests.unit.observe.test_tensorboard import read, scalars

COUNTS = [(6, 0, 2, 0), (1, 3, 2, 2)]


def make_load(step: int, *counts: tuple[int, ...], taken: bool = True) -> Load:
    layers = tuple(RoutingCounts(torch.tensor(each), torch.tensor([0, sum(each) // 2])) for each in counts or COUNTS)
    biases = (torch.tensor([-0.5, 0.25, 0.0, 0.125]), None)
    return Load(step, taken, ("a", "b"), biases, 0.001, layers)


def write(folder: Path, *loads: Load, interval: int = 1, picture_interval: int = 0) -> None:
    with LoadWriter(folder, interval, picture_interval) as writer:
        for load in loads:
            writer.write(load)


def test_the_curves_of_the_load_and_their_floors(tmp_path: Path) -> None:
    loads = [make_load(1), make_load(2, (4, 4, 0, 0), (2, 2, 2, 2), taken=False)]
    write(tmp_path / "load", *loads)
    values, floors = read(tmp_path / "load"), read(tmp_path / "load" / "floor")
    assert scalars(values, "1_overview/max_vio") == [(1, pytest.approx(1.25)), (2, 0.5)]
    assert scalars(values, "1_overview/max_vio_worst_layer") == [(1, 2.0), (2, 1.0)]
    assert scalars(values, "3_details/dead_experts") == [(1, 2.0), (2, 2.0)]
    assert [value for _, value in scalars(floors, "1_overview/max_vio")] == pytest.approx(
        [load.max_vio_floor for load in loads]
    )
    assert scalars(values, "3_details/bias_largest") == [(1, 0.5), (2, 0.5)]


def test_there_is_no_curve_of_what_was_not_measured(tmp_path: Path) -> None:
    write(tmp_path, make_load(1))
    tags = read(tmp_path).Tags()["scalars"]
    unknown = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "max_vio_computation", "step_ms", "rank_load")
    assert not [tag for tag in tags if tag.endswith(unknown)]
    assert {tag for tag in tags if tag.startswith("1_overview")} == {
        "1_overview/max_vio",
        "1_overview/max_vio_worst_layer",
    }
    for folder in (tmp_path, tmp_path / "floor"):
        events = read(folder)
        values = [value for tag in events.Tags()["scalars"] for _, value in scalars(events, tag)]
        assert values and all(value == value for value in values), "no NaN"


def test_the_table_of_layers_has_no_column_of_what_was_not_measured(tmp_path: Path) -> None:
    write(tmp_path, make_load(1), picture_interval=1)
    table = read(tmp_path).Tensors("2_layers/text_summary")[-1].tensor_proto.string_val[0].decode()
    header = next(line for line in table.splitlines() if line.startswith("|"))
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    assert "MaxVio" in titles and "bias" in titles and "nan" not in table
    assert "MaxVio of a computation batch" not in titles
    first, second = table.splitlines()[-2:]
    assert first.startswith("| 0 | 2.000 (") and first.endswith("| -0.5000 to 0.2500 |")
    assert second.startswith("| 1 | 0.500 (") and second.endswith("| none |")


def test_pictures_and_curves_at_their_intervals(tmp_path: Path) -> None:
    write(tmp_path, *(make_load(step) for step in range(1, 13)), interval=2, picture_interval=5)
    events = read(tmp_path)
    assert [step for step, _ in scalars(events, "1_overview/max_vio")] == [2, 4, 6, 8, 10, 12]
    assert [image.step for image in events.Images("2_load_pictures/last_step")] == [6, 10], "the next one after 5"
    assert [each.step for each in events.Histograms("4_distributions/selection_bias")] == [6, 10]


def test_without_pictures(tmp_path: Path) -> None:
    write(tmp_path, make_load(1), picture_interval=0)
    assert not read(tmp_path).Tags()["images"]


def test_a_resumed_run_continues_its_curves(tmp_path: Path) -> None:
    write(tmp_path, *(make_load(step) for step in (1, 2, 3)))
    first = {path.name for path in tmp_path.iterdir() if path.is_file()}
    time.sleep(1.1)  # TensorBoard reads files in the order of the seconds in their names
    write(tmp_path, *(make_load(step, (2, 2, 2, 2), (2, 2, 2, 2)) for step in (3, 4)))
    assert len({path.name for path in tmp_path.iterdir() if path.is_file()} - first) == 1
    assert scalars(read(tmp_path), "1_overview/max_vio")[-2:] == [(3, 0.0), (4, 0.0)]


def test_a_writer_that_is_closed_twice_or_wrote_nothing(tmp_path: Path) -> None:
    writer = LoadWriter(tmp_path / "a" / "b")
    writer.close()
    assert not list((tmp_path / "a" / "b").iterdir())
    writer.write(make_load(1))
    writer.close()
    writer.close()
    assert len(scalars(read(tmp_path / "a" / "b"), "1_overview/max_vio")) == 1


@pytest.mark.parametrize(("interval", "picture_interval"), [(0, 1), (-1, 0), (1, -1)])
def test_intervals_out_of_range_are_refused(tmp_path: Path, interval: int, picture_interval: int) -> None:
    with pytest.raises(UserError, match=rf"interval={interval}, picture_interval={picture_interval}: steps between"):
        LoadWriter(tmp_path, interval, picture_interval)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        LoadWriter(tmp_path / "file" / "load").write(make_load(1))
