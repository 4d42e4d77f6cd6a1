"""Tests of the whole study: the command, its files, and equal results from equal seeds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dist_moe.cli import main as cli
from dist_moe.study.controllers.figure import binned
from dist_moe.study.controllers.results import runs_as_dicts
from dist_moe.study.controllers.simulation import SIZES, LayerSize, Plan, make_plan, run_plan
from dist_moe.study.controllers.variants import VARIANTS

SMALL = Plan((LayerSize(8, 2, 256, 128),), seeds=2, before=20, after=12)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run `dist-moe study controllers --quick` -> its folder and its output."""
    folder = tmp_path_factory.mktemp("study") / "out"
    arguments = [
        "study",
        "controllers",
        "--quick",
        "--seeds",
        "1",
        "--experts",
        "8",
        "--experts",
        "64",
        "--out",
        str(folder),
    ]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


@pytest.fixture(scope="module")
def results(study: tuple[Path, str]) -> dict[str, Any]:
    """Read results.json."""
    contents: dict[str, Any] = json.loads((study[0] / "results.json").read_text())
    return contents


def test_the_command_writes_its_files(study: tuple[Path, str]) -> None:
    folder, output = study
    assert {path.name for path in folder.iterdir()} == {"results.json", "series.jsonl", "table.md", "controllers.png"}
    assert (folder / "controllers.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder) in output
    for variant in VARIANTS:
        assert variant.name in output and f"| {variant.name} |" in (folder / "table.md").read_text()
    assert max(map(len, output[: output.index("Columns `to`")].splitlines())) <= 80, "the table fits a narrow terminal"


def test_results_record_versions_and_settings(results: dict[str, Any]) -> None:
    assert {"torch", "matplotlib", "python"} <= set(results["made"]["versions"])
    assert results["settings"]["drift"] == {"offset_std": 0.3, "walk_std": 0.002, "noise_std": 1.0}
    assert [size["experts"] for size in results["settings"]["sizes"]] == [8, 64]
    assert [variant["name"] for variant in results["settings"]["variants"]] == [variant.name for variant in VARIANTS]


def test_quantile_is_faster_than_sign_and_none_never_converges(results: dict[str, Any]) -> None:
    steps = {
        (run["experts"], run["policy"], phase): run[phase]["near"]
        for run in results["runs"]
        for phase in ("start", "shift")
    }
    for experts, sign in ((8, "sign, 0.001"), (64, "sign, 0.001"), (64, "sign, 0.01")):
        for phase in ("start", "shift"):
            assert steps[experts, "none", phase] is None
            for quantile in ("quantile, sigmoid", "quantile, softmax"):
                by_sign = steps[experts, sign, phase]
                assert 0 < steps[experts, quantile, phase] < (math.inf if by_sign is None else by_sign)


def test_only_sign_rules_have_a_prediction(results: dict[str, Any]) -> None:
    for phase in ("start", "shift"):
        predicted = {run["policy"] for run in results["runs"] if run[phase]["predicted"] is not None}
        assert predicted == {"sign, 0.001", "sign, 0.01", "sign x score, 0.001"}
    steps = {run["policy"]: run["start"]["predicted"] for run in results["runs"] if run["experts"] == 8}
    assert steps["sign, 0.001"] == pytest.approx(10 * steps["sign, 0.01"])


def test_the_series_have_every_step(study: tuple[Path, str], results: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (study[0] / "series.jsonl").read_text().splitlines()]
    assert [line["policy"] for line in lines] == [run["policy"] for run in results["runs"]]
    plan = results["settings"]
    assert {len(line["max_vio"]) for line in lines} == {plan["before"] + plan["after"]}


def test_a_line_of_the_figure_is_a_mean_over_bins_of_equal_width_on_a_log_axis() -> None:
    steps, values = binned([float(step) for step in range(1, 101)], bins=4)
    # Steps 1 and 2; 3 to 9; 10 to 31; 32 to 100: half a decade each.
    assert values == [1.5, 6.0, 20.5, 66.0]
    assert steps == pytest.approx([1.414, 5.640, 19.448, 62.791], abs=1e-3)
    assert binned([5.0, 3.0], bins=40) == ([1.0, 2.0], [5.0, 3.0])


def test_results_depend_on_the_seed_only() -> None:
    first, again = (run_plan(SMALL, lambda line: None) for _ in range(2))
    assert runs_as_dicts(first) == runs_as_dicts(again)
    assert [run.max_vio for run in first] == [run.max_vio for run in again]
    first_seed, second_seed = ([run.max_vio for run in first if run.seed == seed] for seed in (0, 1))
    assert all(one != other for one, other in zip(first_seed, second_seed, strict=True))


def test_a_plan_has_the_requested_sizes() -> None:
    assert make_plan() == Plan()
    assert [size.experts for size in make_plan([256, 8, 256], seeds=5).sizes] == [256, 8]
    assert make_plan([896]).sizes == (SIZES[3],)
    quick = make_plan(quick=True)
    assert [size.experts for size in quick.sizes] == [8] and quick.before + quick.after < 100


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--experts", "12", "experts=12 is no size of this study; use 8, 64, 256 or 896"),
        ("--seeds", "1001", "Input should be less than or equal to 1000"),
    ],
)
def test_a_plan_that_is_not_possible_is_a_user_error(tmp_path: Path, option: str, value: str, rule: str) -> None:
    arguments = ["study", "controllers", option, value, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert rule in result.stderr
    assert not (tmp_path / "out").exists()
