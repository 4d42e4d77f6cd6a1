"""Tests of the files of a run, written into a temporary folder and read back."""

import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml

from dist_moe.observe.record import RunRecorder, archive_previous_run, board_folder, host, source_state, versions
from dist_moe.observe.tensorboard import TensorBoardWriter
from tests.unit.observe.samples import evaluation_sample, step_sample


def lines_of(folder: Path) -> list[dict]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def test_metrics_are_written_at_once_as_one_json_object_per_line(tmp_path: Path) -> None:
    with RunRecorder(tmp_path / "deep" / "run") as recorder:
        recorder.write(step_sample(step=10).as_dict())
        assert [line["step"] for line in lines_of(tmp_path / "deep" / "run")] == [10]
        recorder.write(step_sample(step=20).as_dict())
    lines = lines_of(tmp_path / "deep" / "run")
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[0]["load"] == [[40, 0, 20], [20, 20, 20, 20]]
    assert lines[0]["bias_per_layer"][0] == {"min": -0.25, "max": 0.25, "abs_mean": pytest.approx(1 / 6)}


def test_non_finite_floats_become_null(tmp_path: Path) -> None:
    with RunRecorder(tmp_path) as recorder:
        recorder.write(step_sample(loss=math.nan, loads=()).as_dict())
        recorder.write({"nested": [{"a": math.inf}, (-math.inf, 1.5)]})
    first, second = lines_of(tmp_path)
    assert first["loss"] is None and first["max_vio"] is None and first["grad_norm"] == 0.75
    assert second == {"nested": [{"a": None}, [None, 1.5]]}


def test_a_record_that_json_cannot_express_writes_no_part_of_a_line(tmp_path: Path) -> None:
    with RunRecorder(tmp_path) as recorder:
        with pytest.raises(TypeError):
            recorder.write({"step": 1, "loss": torch.tensor(1.0)})
        recorder.write({"step": 2})
    assert lines_of(tmp_path) == [{"step": 2}]


def test_a_resumed_run_continues_the_file_and_drops_an_incomplete_line(tmp_path: Path) -> None:
    whole = '{"step": 1}\n{"step": 2}\n'
    for torn in ("", '{"step": 3, "lo', "x" * 200_000):
        (tmp_path / "metrics.jsonl").write_text(whole + torn, encoding="utf-8")
        with RunRecorder(tmp_path) as recorder:
            recorder.write({"step": 3})
        assert lines_of(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    # Longer than one block of the search from the end, before and after the last whole line.
    long = json.dumps({"load": list(range(40_000))})
    (tmp_path / "metrics.jsonl").write_text(f"{long}\n{long}\n{long[:-1]}", encoding="utf-8")
    with RunRecorder(tmp_path) as recorder:
        recorder.write({"step": 3})
    assert lines_of(tmp_path) == [json.loads(long), json.loads(long), {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text('{"only": "torn', encoding="utf-8")
    with RunRecorder(tmp_path) as recorder:
        recorder.write({"step": 1})
    assert lines_of(tmp_path) == [{"step": 1}]


def test_writing_outside_the_context_is_an_error(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path)
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl is not open"):
        recorder.write({"step": 1})
    with recorder:
        recorder.write({"step": 1})
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl is not open"):
        recorder.write({"step": 2})


def test_run_json_describes_the_run_and_config_yaml_round_trips(tmp_path: Path) -> None:
    config = {"train": {"learning_rate": 3e-4, "betas": [0.9, 0.95]}, "parallel": {"backend": "gloo"}}
    text = yaml.safe_dump(config)
    with RunRecorder(tmp_path) as recorder:
        recorder.describe({"old": True}, "old: true\n", layout={"workers": 1})
        recorder.describe(config, text, layout={"workers": 2, "expert_parallel": 2, "launcher": "torchrun"})
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run["config"] == config
    assert run["world"] == {"workers": 2, "expert_parallel": 2, "launcher": "torchrun"}
    assert run["argv"] == sys.argv
    assert run["versions"]["torch"] == torch.__version__
    assert run["versions"]["python"] == sys.version.split()[0]
    assert {"deepspeed", "transformers", "dist-moe-train"} <= run["versions"].keys()
    assert run["host"]["cores"] >= 1 and run["host"]["cpu"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == config
    names = ["config.yaml", "events.jsonl", "metrics.jsonl", "run.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_events_have_their_time_and_step_and_continue_the_file(tmp_path: Path) -> None:
    for step in (0, 10):
        with RunRecorder(tmp_path) as recorder:
            recorder.event("start", step, workers=2)
            recorder.event("warning", step + 5, text="a\nb\x1b[31m")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [
        *(("start", 0), ("warning", 5), ("start", 10), ("warning", 15)),
    ]
    assert events[2]["workers"] == 2 and events[3]["text"] == "a\nb\x1b[31m"
    assert all(datetime.fromisoformat(event["time"]).tzinfo is not None for event in events)
    with pytest.raises(RuntimeError, match=r"events\.jsonl is not open"):
        recorder.event("finished", 20)


def test_host_and_versions_are_json() -> None:
    assert json.loads(json.dumps(host())) == host()
    assert versions()["torch"] == torch.__version__


def git(folder: Path, *arguments: str) -> str:
    identity = [
        "-c",
        "user.name=Someone",
        "-c",
        "user.email=someone@example.com",
        "-c",
        "commit.gpgsign=false",
    ]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked, stray = tmp_path / "code.py", tmp_path / "stray.py"
    tracked.write_text("x = 1\n")
    assert source_state(tracked) == {"commit": None, "dirty": None}, "a folder without git"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    stray.write_text("y = 1\n")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_state(tracked) == {"commit": commit, "dirty": False}
    assert source_state(stray) == {"commit": None, "dirty": None}, "an installed copy inside of an unrelated repository"
    tracked.write_text("x = 2\n")
    assert source_state(tracked) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert source_state(tracked) == {"commit": None, "dirty": None}, "a machine without git"


def test_a_name_that_is_not_utf8_is_written_as_an_escape(tmp_path: Path) -> None:
    with RunRecorder(tmp_path) as recorder:
        recorder.event("warning", 1, text="a\udc80b")
    assert json.loads((tmp_path / "events.jsonl").read_text())["text"] == "a\udc80b"


def test_all_files_of_a_run_are_archived_and_those_of_others_stay(tmp_path: Path) -> None:
    assert archive_previous_run(tmp_path) is None
    for number in (1, 2):
        with TensorBoardWriter(tmp_path) as board:
            board.step(step_sample())
            board.evaluation(evaluation_sample())
        with RunRecorder(tmp_path) as recorder:
            recorder.describe({}, "", layout={})
        (tmp_path / "logs").mkdir(exist_ok=True)
        before = {path.name for path in tmp_path.iterdir()} - {"logs", "earlier-1"}
        assert {"metrics.jsonl", "floor", "validation"} < before and any("tfevents" in name for name in before)
        assert archive_previous_run(tmp_path) == tmp_path / f"earlier-{number}"
        assert {path.name for path in (tmp_path / f"earlier-{number}").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"earlier-1", "earlier-2", "logs"}


def test_folders_of_others_with_the_names_of_curves_stay(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "held_out.jsonl").touch()
    assert archive_previous_run(tmp_path) is None
    with TensorBoardWriter(tmp_path / "tensorboard") as board:  # of an earlier version
        board.step(step_sample())
    assert board_folder(tmp_path, continues=True) == tmp_path / "tensorboard"
    assert board_folder(tmp_path, continues=False) == tmp_path
    assert archive_previous_run(tmp_path) == tmp_path / "earlier-1"
    assert {path.name for path in tmp_path.iterdir()} == {"validation", "earlier-1"}
    assert board_folder(tmp_path, continues=True) == tmp_path
