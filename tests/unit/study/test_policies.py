"""Tests of the study of policies: its configurations, real runs of two of them, and its tables of given results."""

import dataclasses
from pathlib import Path

import pytest

from dist_moe.errors import UserError
from dist_moe.study.comparison import findings, markdown, write_comparison
from dist_moe.study.policies import VARIANTS, Result, plan_runs, ratio_by_seed, read_result, table_rows, train_all

CONFIGS = Path(__file__).parents[3] / "configs"
RESULT = Result("threshold", 0, 4.0, 0.5, 0.9, 0.01, 8.0, 12.0, 0.1, 2.5, 1000.0)


def results() -> list[Result]:
    """Return two seeds of threshold routing, without and with adaptive weights."""
    plain = [RESULT, dataclasses.replace(RESULT, seed=1, deviation_percent=6.0)]
    balanced = [
        dataclasses.replace(result, variant="threshold + adaptive weights", deviation_percent=result.seed + 1.0)
        for result in plain
    ]
    return [*plain, *balanced]


def test_every_policy_is_valid_for_the_quick_start(tmp_path: Path) -> None:
    runs = plan_runs(CONFIGS / "quickstart.yaml", tmp_path, 3, [])
    assert len(runs) == 3 * len(VARIANTS) == len({run.folder for run in runs})


@pytest.mark.slow
def test_complete_runs_are_read_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question\n" * 200)
    small = [
        f"data.sources=[{tmp_path}/*.txt,stdlib-code]",
        "train.steps=2",
        "train.warmup_steps=0",
        "observe.interval=1",
    ]
    runs = plan_runs(CONFIGS / "debug.yaml", tmp_path / "out", 1, small)[-2:]
    log: list[str] = []
    first = train_all(runs, jobs=2, log=log.append)
    assert log[0] == "2 runs, 0 of them already complete"
    assert [result.variant for result in first] == ["threshold", "threshold + adaptive weights"]
    for result in first:
        assert 3 < result.validation_loss < 6 and 1 < result.experts_per_token < 12
        assert 0 < result.max_vio <= result.max_vio_worst and 0 < result.max_vio_floor < 1
    assert train_all(runs, jobs=1, log=log.append) == first
    assert log[-1] == "2 runs, 2 of them already complete"
    other = dataclasses.replace(runs[0], argv=(*runs[0].argv, "train.steps=3"))
    assert read_result(other) is None, "a different command line"
    other = dataclasses.replace(runs[0], config={**runs[0].config, "balance": {}})
    assert read_result(other) is None, "a configuration file that has changed"
    write_comparison(tmp_path / "out", runs, first)
    assert (tmp_path / "out" / "policies.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_failed_run_is_reported_with_its_output(tmp_path: Path) -> None:
    (run, *_) = plan_runs(CONFIGS / "debug.yaml", tmp_path, 1, [])
    failing = dataclasses.replace(run, argv=(*run.argv, "train.steps=none"))
    with pytest.raises(UserError, match=r"none, seed 0 ended with exit code 2[\s\S]*train\.steps=none should be"):
        train_all([failing], jobs=1, log=lambda line: None)


def test_ratio_by_seed() -> None:
    assert ratio_by_seed(results(), "deviation_percent", "threshold", "threshold + adaptive weights") == (5.5, 3.0)
    assert "the load deviation of threshold routing by a factor of 5.5 (mean over layers; " in findings(results())[0]


def test_the_table_has_a_row_for_each_policy() -> None:
    assert [row[0] for row in table_rows(results())] == ["threshold", "threshold + adaptive weights"]
    assert "| threshold | 4.0000 | 0.500 | 0.900 | 0.010 | 7.00 ±1.41 |" in markdown(results())
