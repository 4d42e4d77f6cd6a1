"""The study of policies: its configurations, real runs of two of them, and its figures on numbers made by hand."""

import dataclasses
from pathlib import Path

import pytest

from dist_moe.errors import UserError
from dist_moe.study.comparison import findings, markdown, write_comparison
from dist_moe.study.policies import CONTENDERS, Result, plan_runs, ratio, read_result, rows, spread, train_all

CONFIGS = Path(__file__).parents[3] / "configs"
RESULT = Result("threshold", 0, 4.0, 0.5, 0.9, 0.01, 8.0, 12.0, 0.1, 2.5, 1000.0)


def results() -> list[Result]:
    """Two seeds of threshold routing, without and with adaptive weights."""
    plain = [RESULT, dataclasses.replace(RESULT, seed=1, deviation_percent=6.0)]
    levelled = [
        dataclasses.replace(one, contender="threshold + adaptive weights", deviation_percent=one.seed + 1.0)
        for one in plain
    ]
    return [*plain, *levelled]


def test_every_contender_can_be_run_on_the_quick_start(tmp_path: Path) -> None:
    runs = plan_runs(CONFIGS / "quickstart.yaml", tmp_path, 3, [])
    assert len(runs) == 3 * len(CONTENDERS) == len({run.folder for run in runs})


def test_real_runs_are_read_and_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question\n" * 200)
    small = [
        f"data.sources=[{tmp_path}/*.txt,stdlib-code]",
        "train.steps=2",
        "train.warmup_steps=0",
        "observe.interval=1",
    ]
    runs = plan_runs(CONFIGS / "debug.yaml", tmp_path / "out", 1, small)[-2:]
    told: list[str] = []
    first = train_all(runs, jobs=2, tell=told.append)
    assert told[0] == "2 runs, 0 of them are there already"
    assert [result.contender for result in first] == ["threshold", "threshold + adaptive weights"]
    for result in first:
        assert 3 < result.validation_loss < 6 and 1 < result.experts_per_token < 12
        assert 0 < result.max_vio <= result.max_vio_worst and 0 < result.max_vio_floor < 1
    assert train_all(runs, jobs=1, tell=told.append) == first
    assert told[-1] == "2 runs, 2 of them are there already"
    other = dataclasses.replace(runs[0], argv=(*runs[0].argv, "train.steps=3"))
    assert read_result(other) is None, "of another command line"
    other = dataclasses.replace(runs[0], config={**runs[0].config, "balance": {}})
    assert read_result(other) is None, "of a file that was changed since"
    write_comparison(tmp_path / "out", runs, first)
    assert (tmp_path / "out" / "policies.png").stat().st_size > 10_000


def test_a_run_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    (run, *_) = plan_runs(CONFIGS / "debug.yaml", tmp_path, 1, [])
    failing = dataclasses.replace(run, argv=(*run.argv, "train.steps=none"))
    with pytest.raises(UserError, match=r"none, seed 0 ended with exit code 2[\s\S]*train\.steps=none should be"):
        train_all([failing], jobs=1, tell=lambda line: None)


def test_the_ratio_is_taken_seed_by_seed() -> None:
    assert ratio(results(), "deviation_percent", "threshold", "threshold + adaptive weights") == (5.5, 3.0)
    assert findings(results())[0].startswith("Adaptive weights lower the load deviation of threshold routing 5.5 times")


def test_a_spread_says_what_it_knows() -> None:
    assert spread([4.0, 4.002], 4) == "4.0010 ±0.0014"
    assert spread([2.0, 2.0], 2) == "2.00"
    assert spread([1234.5], 0) == "1,234"


def test_the_table_has_a_row_for_each_contender() -> None:
    assert [row[0] for row in rows(results())] == ["threshold", "threshold + adaptive weights"]
    assert "| threshold | 4.0000 | 0.500 | 0.900 | 0.010 | 7.00 ±1.41 |" in markdown(results())
