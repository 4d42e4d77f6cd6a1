"""The plan of a study, a YAML file: which configurations are trained, and with which seeds.

A cell is one run: an arm (what is compared), a case (on what it is compared, such as a task) and a seed.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from dist_moe.config.differences import differences
from dist_moe.config.load import load_config
from dist_moe.config.resolve import resolve
from dist_moe.config.yaml_io import read_mapping, render
from dist_moe.errors import ABSENT, ConfigError, UserError
from dist_moe.section import Section, broken_fields
from dist_moe.text import listed, shown

Settings = dict[str, Any]
PLAN_FOLDER = Path("configs/study")
SMALL = "small"
"""The preset that the texts of the studies describe."""


class Preset(Section):
    """A size of a study.

    Attributes:
        workers: Expert-parallel processes of each run.
        seeds: Of the runs.
        time_limit_minutes: After which a run that has not ended is terminated as failed.
        config: Changes to the configuration of every run.
    """

    workers: int = Field(default=2, ge=1)
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 2])
    time_limit_minutes: float = Field(default=60.0, gt=0)
    config: Settings = Field(default_factory=dict)


class StudyPlan(Section):
    """What a study trains. A file with `extends: FILE` changes the plan of that file in the same folder.

    Attributes:
        config: The configuration of a run, without `run.dir` and `run.seed`.
        cases: Changes to it for each case, by name; a study without cases has one without a name.
        arms: Changes to it for each arm, by name.
        keep: The arms that are used; None: all.
        only: For an arm, the cases that it is trained in; all where it is not listed.
        presets: The sizes of the study.
        analyzed: Whether the loads of the trained model are counted by sequence and by domain.
        checked: Arms of which one cell each is trained again by `--check`.
    """

    config: Settings
    cases: dict[str, Settings] = {"": {}}  # noqa: RUF012  (pydantic copies it)
    arms: Annotated[dict[str, Settings], Field(min_length=1)]
    keep: list[str] | None = None
    only: dict[str, list[str]] = Field(default_factory=dict)
    presets: Annotated[dict[str, Preset], Field(min_length=1)]
    analyzed: bool = False
    checked: Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        case: Name of the case, which may be empty.
        arm: Name of the arm.
        seed: `run.seed`.
        workers: Processes of the run.
        time_limit_s: After which the run is terminated.
        settings: Its configuration without `run.dir`.
        analyzed: As in `StudyPlan`.
    """

    case: str
    arm: str
    seed: int
    workers: int
    time_limit_s: float
    settings: Settings
    analyzed: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        """What distinguishes the cells of a study: case, arm and seed."""
        return self.case, self.arm, self.seed

    @property
    def name(self) -> str:
        """For messages."""
        return ", ".join([*filter(None, (self.case, self.arm)), f"seed {self.seed}"])

    @property
    def digest(self) -> str:
        """Identifies what is trained and measured; equal cells of two studies have equal digests."""
        trained = [self.settings, self.workers, self.analyzed]
        return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, runs: Path) -> Path:
        """The folder of the run."""
        return runs / Path(*(_path_name(part) for part in (self.case, self.arm) if part)) / f"seed-{self.seed}"


def read_plan(path: Path) -> StudyPlan:
    """Read the plan of a study.

    Raises:
        ConfigError: The file cannot be read as YAML.
        UserError: It is not a plan.
    """
    settings = read_mapping(path)
    if (base := settings.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise UserError(
                f"{path}: extends={shown(base)} should be a text; give the name of a plan in the same folder"
            )
        settings = merged(read_mapping(path.parent / base), settings)
    try:
        plan = StudyPlan.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{path} is not the plan of a study: {broken_fields(error)}; correct the file") from None
    for key, names, known in (
        ("keep", plan.keep or [], plan.arms),
        ("checked", plan.checked, plan.keep or plan.arms),
        ("only", list(plan.only), plan.arms),
        ("only", [case for cases in plan.only.values() for case in cases], plan.cases),
    ):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{path}: {key} names {listed(unknown)}; the known names are {listed(known, last='and')}")
    if plan.keep is None:
        return plan
    return plan.model_copy(update={"arms": {arm: plan.arms[arm] for arm in plan.keep}})


def preset_changes(plan: StudyPlan, preset: str) -> dict[str, Any]:
    """Return in what the runs of a preset differ from those of `SMALL`: values by dotted key."""
    found, small = (
        {"workers": size.workers, "seeds": size.seeds, **merged(plan.config, size.config)}
        for size in (plan.presets[preset], plan.presets.get(SMALL, Preset()))
    )
    return {key: value for key, value, _ in differences(found, small) if value is not ABSENT}


def plan_cells(plan: StudyPlan, preset: str) -> list[Cell]:
    """Make the cells of a preset, seed by seed, so that an unfinished study has the same number of seeds in each arm.

    Raises:
        UserError: There is no such preset.
    """
    if preset not in plan.presets:
        raise UserError(f"--preset {preset} is not in the plan; use {listed(plan.presets)}")
    size = plan.presets[preset]
    return [
        _make_cell(plan, size, case, arm, seed)
        for seed in size.seeds
        for case in plan.cases
        for arm in plan.arms
        if case in plan.only.get(arm, plan.cases)
    ]


def _make_cell(plan: StudyPlan, size: Preset, case: str, arm: str, seed: int) -> Cell:
    settings: Settings = {}
    for part in (plan.config, size.config, plan.cases[case], plan.arms[arm], {"run": {"seed": seed}}):
        settings = merged(settings, part)
    return Cell(case, arm, seed, size.workers, 60 * size.time_limit_minutes, settings, plan.analyzed)


def check_cells(cells: list[Cell]) -> None:
    """Check the configuration of each cell of the first seed, as a launch does, before hours of training.

    Raises:
        UserError: A configuration is invalid; the first line names the cell.
    """
    for cell in (cell for cell in cells if cell.seed == cells[0].seed):
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as file:
            file.write(render(cell.settings))
            file.flush()
            try:
                resolve(load_config(file.name, workers=cell.workers), workers=cell.workers)
            except ConfigError as error:
                raise UserError(f"the cell {cell.name} has an invalid configuration:\n{error}") from None


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Merge mappings, at every depth; the second wins."""
    result = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _path_name(text: str) -> str:
    return "-".join(
        "".join(character if character.isalnum() or character in "._" else " " for character in text).split()
    )
