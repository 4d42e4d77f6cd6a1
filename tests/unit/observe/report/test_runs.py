"""Tests of reading run folders: repeated steps, damage, and folders that are not runs."""

import json
import os
from pathlib import Path

import pytest

from dist_moe.errors import UserError
from dist_moe.observe.record import RunRecorder
from dist_moe.observe.report import lines
from dist_moe.observe.report.lines import read_loads, read_metrics
from dist_moe.observe.report.page import make_page, render
from dist_moe.observe.report.runs import MOST_RUNS, RunState, read_runs
from tests.unit.observe.report.sample_runs import EVEN, UNEVEN, write_run
from tests.unit.observe.samples import evaluation_sample, step_sample


def test_trap_T91_steps_that_a_restart_repeats_replace_those_of_before(tmp_path: Path) -> None:
    """Also later ones, which the process before the restart had logged; its checkpoint was older."""
    folder = write_run(tmp_path)
    with RunRecorder(folder) as recorder:
        recorder.write(step_sample(step=20, loads=UNEVEN, loss=9.0).as_dict())
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [(step.step, step.loss) for step in metrics.steps] == [(1, 3.95), (10, 3.5), (20, 9.0)]
    assert metrics.validations == [], "the evaluation after step 30 is of the process before, too"
    loads = list(read_loads(folder / "metrics.jsonl", metrics))
    assert [line.step for line in loads] == [1, 10, 20] and loads[-1].load == [*map(list, UNEVEN)]


def test_an_evaluation_of_the_same_step_replaces_the_one_before(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    with RunRecorder(folder) as recorder:
        recorder.write({**evaluation_sample(step=30).as_dict(), "validation_loss": 1.5})
        recorder.write(step_sample(step=40).as_dict())
        recorder.write({**evaluation_sample(step=40).as_dict(), "validation_loss": 1.25})
    found = read_metrics(folder / "metrics.jsonl").validations
    assert [(line.step, line.metrics["validation_loss"]) for line in found] == [(30, 1.5), (40, 1.25)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 7 is not as expected"),
        ('{"event": "step"}', "step is missing"),
        ('{"event": "step", "step": 0}', "step=0"),
        ('{"event": "step", "step": 31, "loss": NaN}', "NaN is not a JSON number"),
        ('{"event": "step", "step": 31, "loss": "x"}', "loss=x should be a number"),
        ('{"event": "step", "step": 31, "bias_per_layer": [5]}', "bias_per_layer is not a list of ranges"),
        ('{"event": "step", "step": 31, "bias_per_layer": [{"min": "x"}]}', "the min of a bias is not a number"),
        ('{"event": "step", "step": 31, "loss": 1e31}', "loss=1e+31"),
        ('{"step": 31}', "it has no event"),
        ("[" * 5000, "line 7 is not as expected"),
        ('{"event": "step", "step": 31, "tokens": 1e400}', "too large"),
        ('{"event": "validation", "step": 31, "load": [[-1]]}', "load.0.0=-1"),
        ("\x00", "line 7"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_left_out(tmp_path: Path, line: str, reason: str) -> None:
    folder = write_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    (run,) = read_runs([folder])
    assert run.last_step == 30 and len(run.problems) == 1
    assert run.problems[0].startswith("metrics.jsonl: line 7 ") and reason in run.problems[0]
    page = render(make_page([run]))
    assert "this report is not complete" in page and "2.0000" in page


def test_a_line_in_progress_is_no_damage_and_a_load_that_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 40, "lo')
    (run,) = read_runs([folder])
    assert run.problems == [] and run.last_step == 30
    with RunRecorder(folder) as recorder:
        recorder.write(step_sample(step=40, loads=([1, 2, 3],)).as_dict())
        recorder.write({**step_sample(step=50, loads=EVEN).as_dict(), "load": [["x"]]})
    (run,) = read_runs([folder])
    notes = make_page([run]).map_notes
    assert any("the load ends after 4 logged steps" in note for note in notes), notes


def test_a_long_line_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path)
    monkeypatch.setattr(lines, "LARGEST_LINE", 4000)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("x" * 5000 + "\n")
    (run,) = read_runs([folder])
    assert "longer than 4,000 bytes" in run.problems[0] and run.last_step == 30


def test_the_state_of_a_run_is_that_of_its_last_process(tmp_path: Path) -> None:
    folder = write_run(tmp_path, evaluated=False)

    def state() -> RunState:
        return read_runs([folder])[0].state

    assert state() == RunState.OPEN
    with RunRecorder(folder) as recorder:
        recorder.event("stopped", 30)
        assert state() == RunState.STOPPED
        recorder.event("start", 30)
        assert state() == RunState.OPEN
        recorder.event("finished", 40)
        assert state() == RunState.FINISHED
    (folder / "errors").mkdir()
    (folder / "errors/rank-1.txt").write_text("nonsense")
    assert state() == RunState.FAILED
    (folder / "errors/rank-1.txt").unlink()
    (folder / "events.jsonl").unlink()
    assert state() == RunState.OPEN
    with RunRecorder(folder) as recorder:
        recorder.write(evaluation_sample(step=30).as_dict())
    (folder / "events.jsonl").unlink()
    assert state() == RunState.FINISHED, "of a version without events"


def test_a_run_without_run_json_or_without_metrics_gives_a_partial_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name, reason in (
        ("run.json", "run.json cannot be read (No such"),
        ("metrics.jsonl", "metrics.jsonl cannot be"),
    ):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (run,) = read_runs([folder])
        assert reason in run.problems[0] and reason in render(make_page([run]))
        (folder / name).write_bytes(content)
    (folder / "metrics.jsonl").write_text("")
    (run,) = read_runs([folder])
    assert run.problems == ["metrics.jsonl: no step has been logged yet"]
    page = render(make_page([run]))
    assert "No step has been logged yet, so there are no numbers." in page and "balance.rate" in page


@pytest.mark.parametrize("content", ['{"a": ' * 200 + "1" + "}" * 200, "[]", "{", '{"config": 5, "world": []}'])
def test_a_damaged_run_json_is_passed_over(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path)
    (folder / "run.json").write_text(content)
    assert "4.0000" not in render(make_page(read_runs([folder])))


def test_files_that_are_no_files_are_refused_without_waiting(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl", "run.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    with pytest.raises(UserError, match="it is not a regular file"):
        read_runs([folder])


def test_folders_that_are_not_runs_are_named_with_a_remedy(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs/one")
    (folder / "checkpoints/step-000030").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "nowhere is not a folder; name the run.dir of a run"),
        (tmp_path / "runs", "runs is not a run, and has the runs one; name one or some of them"),
        (folder / "checkpoints/step-000030", f"is inside the run {folder}; name that folder"),
        (tmp_path / "empty", "empty is not a run (run.json cannot be read (No such file or directory) and"),
    ):
        with pytest.raises(UserError) as raised:
            read_runs([path])
        assert message in str(raised.value)
    with pytest.raises(UserError, match="is named twice"):
        read_runs([folder, folder / "../one"])
    with pytest.raises(UserError, match=f"{MOST_RUNS + 1} runs; a report shows at most {MOST_RUNS}"):
        read_runs([tmp_path / str(number) for number in range(MOST_RUNS + 1)])


def test_runs_are_named_by_the_ends_of_their_paths_that_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs(folders[:1])] == ["run"]


def test_an_error_from_before_the_last_start_is_over(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "errors").mkdir()
    for rank, year in ((3, 2020), (1, 2020)):  # of two workers, the second wrote its own before rank 0 the start
        text = f'time: {year}-01-01T00:00:00+00:00\nrank: {rank}\ncode: 1\nexception: E\nmessage: "m"\n\n'
        (tmp_path / f"errors/rank-{rank}.txt").write_text(text)
    (run,) = read_runs([tmp_path])
    assert [error.rank for error in run.errors] == [1] and run.state == RunState.FAILED
    (tmp_path / "errors/rank-1.txt").unlink()
    assert read_runs([tmp_path])[0].state == RunState.FINISHED
    later = (tmp_path / "errors/rank-3.txt").read_text().replace("2020", "2999")
    (tmp_path / "errors/rank-3.txt").write_text(later)
    assert read_runs([tmp_path])[0].state == RunState.FAILED, "of a start with more workers that came no further"


def test_of_many_events_the_last_ones_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"event": "warning", "step": step, "text": "w"}) + "\n" for step in range(9))
        file.write(json.dumps({"event": "finished", "step": 30}) + "\n")
    monkeypatch.setattr(lines, "MOST_EVENTS", 5)
    (run,) = read_runs([tmp_path])
    assert len(run.events) == 5 and run.events[-1].event == "finished" and run.state == RunState.FINISHED
    assert "events.jsonl: the first 7 of 12 events are left out" in run.problems


def test_errors_of_workers_are_shown_the_earliest_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "errors").mkdir()
    for rank, second in ((0, 5), (1, 2)):
        (folder / f"errors/rank-{rank}.txt").write_text(
            f"time: 2026-01-01T00:00:0{second}+00:00\nrank: {rank}\ncode: 1\nexception: ValueError\n"
            f"message: {json.dumps(f'boom {rank}')}\n\ntrace"
        )
    page = make_page(read_runs([folder]))
    assert page.runs[0].errors == ["rank 1: ValueError: boom 1", "rank 0: ValueError: boom 0"]
    assert "the run failed" in render(page)
