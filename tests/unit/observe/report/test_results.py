"""Tests of the results of runs, and of the comparison in the terminal."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dist_moe.cli.main import app
from dist_moe.observe.record import RunRecorder
from dist_moe.observe.report.charts import charts
from dist_moe.observe.report.differing import checkpoints, history, machine_facts, warnings
from dist_moe.observe.report.results import MEASURES, Result, Row, result_rows
from dist_moe.observe.report.runs import RunData, read_runs
from dist_moe.observe.report.terminal import comparison, comparison_values, difference_text
from tests.unit.observe.report.sample_runs import UNEVEN, change_json, write_run
from tests.unit.observe.samples import step_sample


def results_of(*runs: RunData) -> dict[str, list[tuple[float | None, float | None]]]:
    return {row.measure.key: [(value, floor) for value, floor in row.results] for row in result_rows(runs)}


def shown(*folders: Path, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in comparison(read_runs(folders)):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_results_of_training_are_means_over_the_last_tenth_of_the_logged_steps(tmp_path: Path) -> None:
    with RunRecorder(tmp_path) as recorder:
        recorder.describe({}, "", layout={})
        for step in range(1, 41):
            recorder.write({**step_sample(step=step).as_dict(), "loss": float(step), "max_vio": step / 10})
        recorder.write({**step_sample(step=41, skipped=True).as_dict(), "loss": None})
    (run,) = read_runs([tmp_path])
    found = results_of(run)
    assert found["loss"] == [(38.5, None)]
    assert found["max_vio"][0][0] == pytest.approx(3.85) and found["max_vio"][0][1] == pytest.approx(
        step_sample().max_vio_floor
    )
    assert found["step"] == [(41.0, None)] and found["tokens"] == [(64.0 * 41, None)]
    assert "validation_loss" not in found, "no run has one"


def test_trap_T91_the_speed_is_that_of_all_tokens_over_all_time_but_that_of_the_first_logged_step(
    tmp_path: Path,
) -> None:
    """Step 1 holds the start of the run. The others are weighted by the steps since the logged one before."""
    with RunRecorder(tmp_path) as recorder:
        recorder.describe({}, "", layout={})
        for step, tokens_per_s, step_ms in ((1, 1.0, 64_000.0), (10, 640.0, 100.0), (20, 320.0, 200.0)):
            recorder.write({**step_sample(step=step).as_dict(), "tokens_per_s": tokens_per_s, "step_ms": step_ms})
    (run,) = read_runs([tmp_path])
    found = results_of(run)
    seconds = 9 * 0.1 + 10 * 0.2
    assert found["tokens_per_s"][0][0] == pytest.approx(19 * 64 / seconds)
    assert found["step_ms"][0][0] == pytest.approx(1000 * seconds / 19)


def test_every_result_of_an_evaluation_is_that_of_the_record(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    found = results_of(*read_runs([folder]))
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for key in ("validation_loss", "bits_per_byte", "max_vio_global", "load_deviation_percent", "experts_per_token"):
        assert found[key] == [(record[key], record.get(f"{key}_floor"))]
    assert set(found) == {measure.key for measure in MEASURES} - {"unrouted_percent"}, "every token took an expert"


def test_a_difference_of_negative_numbers_has_its_sign() -> None:
    def difference(one: float, other: float) -> str:
        return difference_text(Row(MEASURES[0], (Result(one), Result(other))))

    assert difference(-0.2, -0.1) == "+0.1000 (+50.0%)" and difference(-0.1, -0.2) == "-0.1000 (-100.0%)"


def test_runs_without_step_times_have_no_curve_over_time(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    path = runs[0] / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "step_ms": None}) + "\n" for line in lines))
    (chart,) = (each for each in charts(read_runs(runs)) if each.key == "loss-over-time")
    assert [len(line.finite()) for line in chart.lines] == [0, 4]


def test_tokens_without_an_expert_have_a_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path, evaluated=False)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "unrouted_percent": 12.5}) + "\n" for line in lines))
    assert results_of(*read_runs([folder]))["unrouted_percent"] == [(12.5, None)]


def test_the_comparison_has_results_floors_and_differences(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", ["balance.rate=0.5"], loads=(UNEVEN,) * 4)]
    text = shown(*folders)
    rows = {words[0]: words[1:] for line in text.splitlines() if len(words := line.split()) > 1}
    assert rows["validation"] == ["loss", "2.0000", "2.0000", "+0.0000", "(+0.0%)"]
    assert rows["MaxVio_global"][:3] == ["0.000", "2.000", "+2.000"]
    assert rows["floor"], "a row of its own"
    assert rows["balance.rate"] == ["0.04", "0.5"]
    assert "not comparable" not in text and "train.learning_rate" not in text
    values = comparison_values(read_runs(folders))
    assert values["config"] == {"balance.rate": ["0.04", "0.5"]} and values["not_comparable"] == []
    assert values["runs"][1]["results"]["max_vio_global"] == pytest.approx(2.0)
    assert 0 < values["runs"][1]["floors"]["max_vio_global"] < 1
    json.dumps(values, allow_nan=False)


def test_names_and_values_that_look_like_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "[red]a"), write_run(tmp_path / "b")]
    config = json.loads((folders[0] / "run.json").read_text())["config"]
    config["run"]["[bold]x\x1b[2J"] = "[/nothing]"
    change_json(folders[0] / "run.json", config=config)
    text = shown(*folders)
    assert "[red]a" in text and "[/nothing]" in text and "\x1b" not in text


def test_the_history_has_starts_resumes_warnings_and_checkpoints(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    with RunRecorder(folder) as recorder:
        recorder.event("start", 20, workers=1, resumed_from="checkpoints/step-000020")
        recorder.event("warning", 25, text="uneven")
        recorder.event("stopped", 30, checkpoint=None)
    (run,) = read_runs([folder])
    assert [(step, what) for _, step, what in history(run)] == [
        ("0", "started with 2 workers"),
        ("30", "finished"),
        ("20", "resumed after step 20 from checkpoints/step-000020 with 1 worker"),
        ("30", "stopped on request"),
    ]
    assert warnings(run) == [("25", "uneven")]
    assert checkpoints(run) == "1 checkpoint, the last one of 1.5 MB after step 30; training stalled for 12 ms for each"


def test_machine_facts_mark_what_differs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", ["run.seed=4"])]
    change_json(folders[1] / "run.json", source={"commit": "f" * 40, "dirty": True})
    facts = {fact.name: fact for fact in machine_facts(read_runs(folders))}
    assert facts["seed"].values == ("0", "4") and facts["seed"].differs
    assert facts["commit"].values[1] == f"{'f' * 40} with changes" and not facts["torch"].differs
    assert "accelerators" not in facts, "no run has one"


def test_the_commands_write_a_page_and_compare(tmp_path: Path) -> None:
    folders = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    out = tmp_path / "page.html"
    made = CliRunner().invoke(app, ["report", *folders, "--out", str(out)])
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith(f"Report: {out} (") and "comparison of 2 runs" in out.read_text()
    compared = CliRunner().invoke(app, ["compare", *folders])
    assert compared.exit_code == 0 and "Their configurations are equal." in compared.stdout
    values = json.loads(CliRunner().invoke(app, ["compare", *folders, "--json"]).stdout)
    assert [run["name"] for run in values["runs"]] == ["a", "b"]
    alone = CliRunner().invoke(app, ["compare", folders[0]])
    assert alone.exit_code == 2 and "is one run; name two or more to compare" in alone.stderr
    nowhere = CliRunner().invoke(app, ["report", str(tmp_path / "no"), "--out", str(out)])
    assert nowhere.exit_code == 2 and "is not a folder" in nowhere.stderr
    (Path(folders[0]) / "metrics.jsonl").write_text("")
    partial = CliRunner().invoke(app, ["report", folders[0], "--out", str(out)])
    assert partial.exit_code == 0 and "warning: a: metrics.jsonl: no step has been logged yet" in partial.stderr
