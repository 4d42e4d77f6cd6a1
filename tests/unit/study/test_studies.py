"""Tests of the studies' claims, tables and figures, on results with the fields of real evaluations."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.observe.evaluation import evaluation_metrics
from dist_moe.study.dynamic import THRESHOLDS, loss_at
from dist_moe.study.grid.cells import scalars
from dist_moe.study.grid.page import Study, write_page
from dist_moe.study.grid.plan import Cell, plan_cells, preset_changes, read_plan
from dist_moe.study.grid.statistics import Results
from dist_moe.study.grid.store import CellResult
from tests.unit.study.grid.results import with_values

PLANS = Path(__file__).parents[3] / "configs" / "study"
STUDIES = ("nlu", "loss_free", "dynamic", "specialization")
HARD_TO_BALANCE = {"none", "none, softmax gate", "threshold 0.4", "budget 1.8", "top-2", "budget 1.8, centered router"}


def batch(ranks: int, max_vio: float) -> dict[str, float]:
    """Make the measures of computation batches."""
    return {"ranks": ranks, "batches": 4, "max_vio": max_vio, "max_vio_floor": 0.2 / ranks}


def make_result(cell: Cell, number: int) -> CellResult:
    """Make the result of a cell; arms without balancing are ten times as imbalanced as the others."""
    spread = 400 if cell.arm in HARD_TO_BALANCE else 40
    load_E = torch.tensor([1000 + spread + number % 3, 1000, 1000, 1000 - spread])
    metrics = evaluation_metrics(
        step=2,
        total_nats=3.0 * 1200 + number % 5 + cell.seed,
        tokens=1200,
        text_bytes=0 if cell.case else 5000,
        load_L=[load_E, load_E],
        k_histogram_L=[torch.tensor([1000, 1500])] * 2,
        task_metrics={"accuracy": 0.8 + 0.001 * cell.seed, "macro_f1": 0.79, "matthews": 0.6} if cell.case else None,
    )
    curves: dict[str, list[float | None]] = {
        "step": [1.0, 2.0],
        "max_vio": [1.0, spread / 1000],
        "max_vio_floor": [0.1, 0.1],
    }
    loads = {
        "computation": [
            {"ranks": r, "batches": 4, "max_vio": 0.5 + 1 / r, "max_vio_floor": 0.2 / r} for r in (1, 2, 64)
        ],
        "domains": ["python", "drama"],
        "tokens_by_domain": [2000, 2000],
        "documents_by_domain": [20, 3],
        "information_by_chance": [0.02, 0.03],
        "by_domain": [[[900, 600, 300, 200], [200, 300, 600, 900]]] * 2,
    }
    values = {**scalars(metrics.as_dict()), "step_ms": 500.0 + cell.seed, "wall_s": 60.0}
    values |= {"train_max_vio": 0.5, "train_max_vio_floor": 0.1}
    return CellResult(cell.case, cell.arm, cell.seed, cell.digest, values, curves, loads, "abc", False, {"cores": 2})


def all_results(name: str) -> tuple[Study, list[Cell], list[CellResult]]:
    """Return a study, its cells and a result of each."""
    cells = plan_cells(read_plan(PLANS / f"{name}.yaml"), "small")
    study: Study = importlib.import_module(f"dist_moe.study.{name}").STUDY
    return study, cells, [make_result(cell, number) for number, cell in enumerate(cells)]


@pytest.mark.parametrize("name", STUDIES)
def test_every_claim_is_judged_and_every_column_and_figure_has_values(tmp_path: Path, name: str) -> None:
    study, cells, made = all_results(name)
    results = Results(made)
    assert {claim.verdict for claim in study.claims(results)} <= {"holds", "does not hold", "not resolved"}
    folder = tmp_path / name
    write_page(tmp_path / "page.md", study, "small", cells, results, folder)
    page = (tmp_path / "page.md").read_text()
    assert f"All {len(cells)} runs of the plan are finished." in page and "**Not measured**" not in page
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| arm")]
    arms = {cell.arm for cell in cells}
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows} >= arms
    empty = [row for row in rows if row.split(" | ")[0].removeprefix("| ") in arms and " |  |" in row]
    assert empty == [], "each arm has a value in each column"
    pictures = list(folder.glob("*.png"))
    assert pictures and all(f"({name}/{picture.name})" in page for picture in pictures)
    assert max(map(len, page.splitlines())) < 400


def test_the_accuracies_of_all_runs_have_intervals(tmp_path: Path) -> None:
    study, cells, made = all_results("nlu")
    write_page(tmp_path / "page.md", study, "small", cells, Results(made), tmp_path / "nlu")
    # 80 % of 1,200: Wilson's interval is 0.7764 to 0.8217.
    row = "| rotten_tomatoes, top-2 | 0 | 80.00 | 77.6 to 82.2 |"
    assert row in (tmp_path / "page.md").read_text()


def test_runs_are_compared_by_the_examples_that_only_one_of_them_has_right(tmp_path: Path) -> None:
    study, cells, made = all_results("nlu")
    all_right, four_wrong = "f" * 300, "0" + "f" * 299
    right = {"top-2": all_right, "threshold 0.4 + weights 0.1": four_wrong}
    made = [
        CellResult(**{**vars(one), "loads": {"evaluation": {"correct_examples": right.get(one.arm, all_right)}}})
        for one in made
    ]
    (tmp_path / "nlu").mkdir()
    found = {"majority": 0.5, "linear_few": 0.6, "linear": 0.7, "few": 1920, "examples": 9000, "held_out": 1313}
    (tmp_path / "nlu" / "baselines.json").write_text(json.dumps({"rotten_tomatoes": found}))
    write_page(tmp_path / "page.md", study, "small", cells, Results(made), tmp_path / "nlu")
    page = (tmp_path / "page.md").read_text()
    # -4 / 1200; 1.96 * sqrt((4 / 1200 - (4 / 1200)**2) / 1200); 2 / 2**4.
    assert page.count(" | 0 | 4 | -0.33 ± 0.33 | 0.12 |") == 12, "four tasks, three seeds"
    assert "| rotten_tomatoes | 50.0 | 60.0 | 70.0 | 80.1 | 80.1 | 80.1 | 1,920 | 9,000 | 1,313 |" in page
    assert not re.search(r"[a-z]-\n[a-z]", page, re.IGNORECASE), "no word is broken at its hyphen"
    damages: tuple[Any, ...] = (None, [], *({"correct_examples": each} for each in (None, "zz", "f")))
    for damaged in damages:
        broken = [CellResult(**{**vars(one), "loads": {"evaluation": damaged}}) for one in made]
        write_page(tmp_path / "page.md", study, "small", cells, Results(broken), tmp_path / "nlu")
        assert "Compared by example" not in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_of_another_preset_says_what_its_runs_have(tmp_path: Path, name: str) -> None:
    study, cells, made = all_results(name)
    changes = {"model.upcycle_layers": None, "model.config.hidden_size": 768, "train.steps": 1000}
    write_page(tmp_path / "page.md", study, "full", cells, Results(made), tmp_path / name, changes)
    page = " ".join((tmp_path / "page.md").read_text().split())
    fields = "`model.upcycle_layers=null`, `model.config.hidden_size=768`, `train.steps=1000`"
    assert f"those of the preset `small`. The results are of the preset `full`, which has {fields}." in page
    assert f"dist-moe study {name.replace('_', '-')} --preset full" in page
    write_page(tmp_path / "small.md", study, "small", cells, Results(made), tmp_path / name)
    assert "preset `small`" not in (tmp_path / "small.md").read_text()
    plan = read_plan(PLANS / f"{name}.yaml")
    assert preset_changes(plan, "small") == {}
    found = preset_changes(plan, "full")
    assert found["seeds"] == [0, 1, 2, 3, 4] and found["train.precision"] == "bf16"


def test_the_loss_between_arms_is_read_on_a_line_and_not_beyond_them() -> None:
    made = Results(
        [
            with_values("threshold 0.5", 0, "", {"experts_per_token": 2.0, "validation_loss": 3.0}),
            with_values("threshold 0.3", 0, "", {"experts_per_token": 1.0, "validation_loss": 4.0}),
            with_values("threshold 0.4", 1, "", {"experts_per_token": 1.5, "validation_loss": 9.0}),
        ]
    )
    assert loss_at(made, THRESHOLDS, 0, 1.25) == pytest.approx(3.75)
    assert loss_at(made, THRESHOLDS, 0, 2.1) is None and loss_at(made, THRESHOLDS, 1, 1.5) is None


@pytest.mark.parametrize("name", STUDIES)
def test_a_diverged_run_and_missing_arms_leave_a_page(tmp_path: Path, name: str) -> None:
    study, cells, made = all_results(name)
    lost = {"validation_loss": None, "accuracy": None, "max_vio_global": None}
    made[0] = CellResult(**{**vars(made[0]), "values": {**made[0].values, **lost}})
    write_page(tmp_path / "page.md", study, "small", cells, Results(made), tmp_path / name)
    assert "(2 of 3)" in (tmp_path / "page.md").read_text(), "the seed without a finite loss is counted"
    write_page(tmp_path / "part.md", study, "small", cells, Results(made[:1]), tmp_path / name)
    assert "**Not measured**" in (tmp_path / "part.md").read_text()
    write_page(tmp_path / "none.md", study, "small", cells, Results([]), tmp_path / name)
    assert f"0 of {len(cells)} runs of the plan are finished." in (tmp_path / "none.md").read_text()


def test_equal_losses_are_a_cost_below_the_margin_and_equal_information_is_kept() -> None:
    for name, words in (
        ("dynamic", "adaptive weights, with which"),
        ("specialization", "Loss-free balancing keeps the"),
    ):
        study, _, made = all_results(name)
        equal = [CellResult(**{**vars(one), "values": {**one.values, "validation_loss": 3.0}}) for one in made]
        (claim,) = (claim for claim in study.claims(Results(equal)) if words in claim.text)
        assert claim.verdict == "holds", claim


def test_the_excess_over_the_floor_is_compared_between_computation_batches() -> None:
    study, _, made = all_results("loss_free")
    (claim,) = (claim for claim in study.claims(Results(made)) if "computation batch" in claim.text)
    # From 1.5 - 0.2 to 0.515625 - 0.003125, with every seed.
    assert claim.verdict == "holds" and claim.evidence.startswith("from 1 to 64 ranks -0.788 ± 0.000")
    at_floor = [batch(ranks, 0.2 / ranks) for ranks in (1, 64)]
    by_chance = [CellResult(**{**vars(one), "loads": {**one.loads, "computation": at_floor}}) for one in made]
    (claim,) = (claim for claim in study.claims(Results(by_chance)) if "computation batch" in claim.text)
    assert claim.verdict != "holds", "chance alone makes the floor fall"
