"""Tests of the plans of studies: those of the repository, their cells, and what is refused."""

from pathlib import Path

import pytest

from dist_moe.errors import UserError
from dist_moe.study.grid.plan import check_cells, merged, plan_cells, read_plan

CONFIGS = Path(__file__).parents[4] / "configs" / "study"
PLANS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SMALL = """
config: {model: {architecture: qwen3_moe}, run: {threads: 1}}
cases: {first: {data: {sources: [a]}}, second: {}}
arms: {plain: {balance: {policy: none}}, "b, 0.1": {balance: {policy: loss_free, rate: 0.1}}}
only: {plain: [second]}
presets: {small: {seeds: [3, 4], config: {run: {threads: 2}}}}
checked: [plain]
"""


def test_the_plans_of_the_repository_are_the_studies_of_the_command_line() -> None:
    from dist_moe.cli.study import GRIDS

    assert sorted(GRIDS) == PLANS


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_has_a_small_and_a_full_preset_whose_cells_are_distinct(name: str) -> None:
    plan = read_plan(CONFIGS / f"{name}.yaml")
    assert list(plan.presets) == ["small", "full"]
    for preset in plan.presets:
        cells = plan_cells(plan, preset)
        assert len({cell.digest for cell in cells}) == len({cell.key for cell in cells}) == len(cells)
        assert len({cell.folder(Path()) for cell in cells}) == len(cells)
        assert len({cell.seed for cell in cells}) >= 3


def test_cells_are_ordered_by_seed_and_have_the_merged_configuration(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL)
    cells = plan_cells(read_plan(tmp_path / "plan.yaml"), "small")
    keys = [cell.key for cell in cells]
    assert keys[:3] == [("first", "b, 0.1", 3), ("second", "plain", 3), ("second", "b, 0.1", 3)] and len(keys) == 6
    assert cells[0].settings == {
        "model": {"architecture": "qwen3_moe"},
        "run": {"threads": 2, "seed": 3},
        "data": {"sources": ["a"]},
        "balance": {"policy": "loss_free", "rate": 0.1},
    }
    assert cells[0].folder(Path("runs")) == Path("runs/first/b-0.1/seed-3")


def test_a_plan_extends_another_and_keeps_some_of_its_arms(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL)
    (tmp_path / "other.yaml").write_text("extends: plan.yaml\nkeep: ['b, 0.1']\nchecked: ['b, 0.1']\n")
    whole, part = (plan_cells(read_plan(tmp_path / name), "small") for name in ("plan.yaml", "other.yaml"))
    assert [cell.digest for cell in part] == [cell.digest for cell in whole if cell.arm == "b, 0.1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("checked: [plain]|checked: [plane]", "checked names plane; the known names are plain and b, 0.1"),
        ("only: {plain: [second]}|only: {plain: [third]}", "only names third; the known names are first and second"),
        ("seeds: [3, 4]|seeds: []", "presets.small.seeds"),
        ("seeds: [3, 4]|sedes: [3, 4]", "sedes"),
        ("checked: [plain]|", "checked is missing"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_place(tmp_path: Path, change: str, words: str) -> None:
    old, new = change.split("|")
    (tmp_path / "plan.yaml").write_text(SMALL.replace(old, new))
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        read_plan(tmp_path / "plan.yaml")


def test_an_unknown_preset_and_an_invalid_cell_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL)
    plan = read_plan(tmp_path / "plan.yaml")
    with pytest.raises(UserError, match="--preset large is not in the plan; use small"):
        plan_cells(plan, "large")
    with pytest.raises(UserError, match=r"the cell first, b, 0\.1, seed 3 has an invalid configuration:"):
        check_cells(plan_cells(plan, "small"))


def test_mappings_merge_at_every_depth() -> None:
    assert merged({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 1}}) == {
        "a": {"b": 1, "c": [2]},
        "d": {"e": 1},
    }
