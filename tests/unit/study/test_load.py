"""Tests of the figure of the load: what is read from metrics.jsonl, and the command that draws it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dist_moe.cli import main as cli
from dist_moe.errors import UserError
from dist_moe.observe.pictures.scale import colors
from dist_moe.observe.record import RunRecorder
from dist_moe.study.load import THEMES, draw_load_figure, least_balanced_layer, read_histories
from tests.unit.observe.samples import evaluation_sample, step_sample

EVEN, UNEVEN = ([20, 20, 20, 20], [15, 15, 15, 15]), ([20, 20, 20, 20], [60, 0, 0, 0])


def write_run(folder: Path, policy: str, loads: tuple[list[int], ...] = EVEN) -> Path:
    with RunRecorder(folder) as recorder:
        recorder.describe({"balance": {"policy": policy}}, "", layout={})
        for step in (1, 10, 20):
            recorder.write(step_sample(step=step, loads=UNEVEN if step == 1 else loads).as_dict())
        recorder.write(evaluation_sample(step=20, loads=loads).as_dict())
    return folder


def test_the_last_record_of_a_step_is_valid_and_skipped_steps_are_omitted(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "quantile")
    with RunRecorder(folder) as recorder:
        recorder.write(step_sample(step=10, loads=UNEVEN).as_dict())
        recorder.write(step_sample(step=30, skipped=True).as_dict())
    (history,) = read_histories([folder])
    assert (history.label, history.steps) == ("quantile", [1, 10, 20])
    assert history.load == [[*map(list, UNEVEN)], [*map(list, UNEVEN)], [*map(list, EVEN)]]
    assert history.max_vio == [1.5, 1.5, 0.0] and all(0 < floor < 1 for floor in history.floor)
    assert least_balanced_layer([history]) == 1


def test_runs_of_one_policy_are_labeled_with_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, policy) for name, policy in (("a", "none"), ("b", "none"), ("c", "quantile"))]
    assert [history.label for history in read_histories(folders)] == ["none (a)", "none (b)", "quantile"]


@pytest.mark.parametrize("options", [(), ("--dark",)])
def test_the_command_draws_both_themes(tmp_path: Path, options: tuple[str, ...]) -> None:
    folders = [write_run(tmp_path / policy, policy) for policy in ("loss_free", "none")]
    out = tmp_path / "new" / "load.png"
    result = CliRunner().invoke(cli.app, ["study", "load", *map(str, folders), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    pixels = np.asarray(Image.open(out).convert("RGB"))
    background = THEMES["dark" if options else "light"][0]
    assert "#" + bytes(pixels[0, 0].tolist()).hex() == background
    assert pixels.shape[1] == 1800, "twice the width of a README, for screens of high resolution"


def test_an_expert_of_five_times_the_mean_is_told_from_one_of_twice_the_mean(tmp_path: Path) -> None:
    for most in (2, 5, 6):
        folder = tmp_path / str(most)
        with RunRecorder(folder) as recorder:
            for step in (1, 10):
                recorder.write(step_sample(step=step, loads=([most * 7, *[8 - most] * 7],)).as_dict())
        draw_load_figure(folder / "load.png", read_histories([folder]))
        with Image.open(folder / "load.png") as image:
            shown = [color for count, color in image.convert("RGB").getcolors(1 << 24) or [] if count > 2000]
        expected = colors(np.array(float(most)))
        assert any(np.abs(np.array(color, dtype=int) - expected).max() <= 2 for color in shown)


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_no_text_is_cut_off_at_the_edge_of_the_figure(tmp_path: Path, runs: int) -> None:
    folders = [write_run(tmp_path / str(number), "none") for number in range(runs)]
    draw_load_figure(tmp_path / "load.png", read_histories(folders))
    with Image.open(tmp_path / "load.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == pixels[0, 0]).all()


def test_a_folder_without_a_run_is_a_user_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["study", "load", str(tmp_path / "nowhere")])
    reason = "nowhere/metrics.jsonl cannot be read (No such file or directory); name the run.dir of a run"
    assert result.exit_code == 2 and reason in result.stderr
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "validation"}) + "\n")
    with pytest.raises(UserError, match="has no logged step with a load"):
        read_histories([tmp_path])


def test_different_models_and_missing_layers_are_user_errors(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", "none"), tmp_path / "b"]
    with RunRecorder(folders[1]) as recorder:
        recorder.write(step_sample(loads=([1, 2],)).as_dict())
    with pytest.raises(UserError, match="compare runs of one model"):
        read_histories(folders)
    with pytest.raises(UserError, match="layer=2; the model has 2 MoE layers, counted from 0"):
        draw_load_figure(tmp_path / "load.png", read_histories(folders[:1]), layer=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "line 6 is not JSON"),
        ('{"event": "step", "step": 30}', r"line 6 is not the record of a step \(skipped: Field required\)"),
        (
            '{"event": "step", "step": 30, "skipped": false, "max_vio": 0.5, "max_vio_floor": 0.1, ',
            "line 6 is not JSON",
        ),
        (
            '{"event": "step", "step": 30, "skipped": false, "max_vio": 0.5, "max_vio_floor": 0.1,'
            ' "max_vio_per_layer": [0.5], "load": [[4, 2]]}',
            "has steps of models with different layers or experts",
        ),
    ],
)
def test_a_damaged_file_is_a_user_error(tmp_path: Path, line: str, message: str) -> None:
    path = write_run(tmp_path, "none") / "metrics.jsonl"
    assert path.read_text().count("\n") == 4
    with path.open("a") as file:
        file.write(f'{{"event": "other"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        read_histories([tmp_path])


def test_a_line_that_is_being_written_is_ignored(tmp_path: Path) -> None:
    path = write_run(tmp_path, "none") / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    assert read_histories([tmp_path])[0].steps == [1, 10, 20]


def test_an_out_that_cannot_be_written_is_refused_by_every_command_before_it_works(tmp_path: Path) -> None:
    folder, quickstart = write_run(tmp_path / "run", "none"), Path(__file__).parents[3] / "configs" / "quickstart.yaml"
    commands = {
        ("study", "load", str(folder), "--out"): "file",
        ("study", "hops", "--out"): "file",
        ("study", "controllers", "--out"): "folder",
        ("study", "policies", str(quickstart), "--out"): "folder",
        ("launch", str(quickstart), "--write"): "folder",
        ("doctor", str(quickstart), "--json"): "file",
    }
    for command, kind in commands.items():
        result = CliRunner().invoke(cli.app, [*command, "/dev/null/x/y"])
        line = f"{command[-1]}=/dev/null/x/y cannot be written (Not a directory: /dev/null/x"
        assert result.exit_code == 2 and result.stderr.startswith(line), result.output
        assert f"; set {command[-1]} to a {kind} on a disk with free space and write permission\n" in result.stderr
        assert result.stdout == ""
    of_files = [
        ("study", "load", str(folder), "--out"),
        ("study", "hops", "--out"),
        ("doctor", str(quickstart), "--json"),
    ]
    for *words, option in of_files:
        result = CliRunner().invoke(cli.app, [*words, option, str(tmp_path)])
        assert result.exit_code == 2 and f"{option}={tmp_path} cannot be written (Is a directory" in result.stderr


def test_the_figure_is_a_png_whatever_its_name(tmp_path: Path) -> None:
    out = tmp_path / "figure.txt"
    result = CliRunner().invoke(cli.app, ["study", "load", str(write_run(tmp_path, "none")), "--out", str(out)])
    assert result.exit_code == 0 and out.read_bytes().startswith(b"\x89PNG")
