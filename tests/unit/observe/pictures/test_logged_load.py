"""Tests of reading the load of earlier steps: the last line of a step counts, and no damage ends a run."""

import json
from pathlib import Path

import pytest

from dist_moe.observe.pictures import logged_load
from dist_moe.observe.pictures.logged_load import logged_loads
from dist_moe.observe.record import RunRecorder
from tests.unit.observe.samples import evaluation_sample, step_sample

FIRST, SECOND = [[3, 1], [2, 2]], [[4, 0], [1, 3]]


def write_run(folder: Path) -> Path:
    with RunRecorder(folder) as recorder:
        for step, load in ((1, FIRST), (10, FIRST), (20, FIRST), (10, SECOND)):
            recorder.write(step_sample(step=step, loads=load).as_dict())
        recorder.write(step_sample(step=15, loads=FIRST, skipped=True).as_dict())
        recorder.write(evaluation_sample(step=10, loads=FIRST).as_dict())
    return folder / "metrics.jsonl"


def test_the_last_line_of_each_step_up_to_the_resumed_one_is_returned(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    assert logged_loads(path, 10) == [(1, FIRST), (10, SECOND)]
    assert logged_loads(path, 19) == [(1, FIRST), (10, SECOND)]
    assert logged_loads(path, 20) == [(1, FIRST), (10, SECOND), (20, FIRST)]


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "step", "st',
        "[]",
        json.dumps({"event": "step", "step": 5}),
        json.dumps({"event": "step", "step": "5", "load": FIRST}),
        json.dumps({"event": "step", "step": 5, "load": [[]]}),
        json.dumps({"event": "step", "step": 5, "load": [[1, -2]]}),
        json.dumps({"event": "step", "step": 5, "load": [[1, 2, 3]]}),
    ],
)
def test_a_damaged_line_is_omitted(tmp_path: Path, line: str) -> None:
    path = write_run(tmp_path)
    path.write_text(line + "\n" + path.read_text())
    assert logged_loads(path, 10) == [(1, FIRST), (10, SECOND)]


def test_a_missing_file_is_no_load(tmp_path: Path) -> None:
    assert logged_loads(tmp_path / "metrics.jsonl", 10) == []


def test_of_a_large_file_a_part_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunRecorder(tmp_path) as recorder:
        for step in range(1, 101):
            recorder.write(step_sample(step=step, loads=FIRST).as_dict())
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(logged_load, "MAX_PARSED_BYTES", path.stat().st_size // 10)
    found = logged_loads(path, 100)
    assert 8 <= len(found) <= 10 and found == sorted(found)
