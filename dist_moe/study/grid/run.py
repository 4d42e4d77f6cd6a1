"""Runs a study: trains the cells that have no result, writes results and page after each, and checks single cells."""

import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from dist_moe.errors import UserError, needs_folder
from dist_moe.files import file_lock
from dist_moe.study.grid.cells import Analysis, run_cell
from dist_moe.study.grid.page import BASELINES, TIMES, Log, Study, write_page
from dist_moe.study.grid.plan import PLAN_FOLDER, Cell, check_cells, plan_cells, preset_changes, read_plan
from dist_moe.study.grid.statistics import Results
from dist_moe.study.grid.store import CellResult, finished, read_results, refuse_others, results_file, write_results
from dist_moe.text import counted, listed

SPREADS = 4.0
"""A repeated cell may differ from the recorded one by this many standard deviations over seeds."""
MOST_FAILURES = 3


class Place(NamedTuple):
    """Where a study reads and writes.

    Attributes:
        plan: The YAML file.
        out: The folder of results and figures.
        runs: The folder of the runs.
    """

    plan: Path
    out: Path
    runs: Path

    @property
    def page(self) -> Path:
        """The page, next to the folder of the results."""
        return self.out.parent / f"{self.out.name}.md"


class Part(NamedTuple):
    """What a call of a study trains.

    Attributes:
        preset: Which size.
        cases: Only the cells of these cases; all where it is empty.
        seeds: Only the cells of these seeds; all where it is empty.
        minutes: No cell begins that would probably end later than this; None: no limit.
    """

    preset: str
    cases: Sequence[str] = ()
    seeds: Sequence[int] = ()
    minutes: float | None = None

    def chosen(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells of the cases and seeds.

        Raises:
            UserError: The plan has no such case or seed.
        """
        for option, given, known in (
            ("--case", self.cases, {cell.case: None for cell in cells}),
            ("--seed", self.seeds, {cell.seed: None for cell in cells}),
        ):
            if unknown := [value for value in given if value not in known]:
                raise UserError(f"{option} {unknown[0]} is not in the plan; use {listed(known)}")
        return [
            cell
            for cell in cells
            if (not self.cases or cell.case in self.cases) and (not self.seeds or cell.seed in self.seeds)
        ]


def default_plan(name: str) -> Path:
    """The plan of a study in a checkout."""
    return PLAN_FOLDER / f"{name}.yaml"


def run_study(study: Study, place: Place, part: Part, log: Log) -> Results:
    """Train the cells without a result; write results.json after each, and at the end the figures and the page.

    A cell that fails is left out, and the next ones are trained, until `MOST_FAILURES` in a row fail.

    Args:
        study: Which.
        place: Its files.
        part: Which cells.
        log: Receives a line for each cell.

    Raises:
        UserError: The plan or the results cannot be read, a package is missing, or a run failed.
    """
    require_packages(study)
    plan = read_plan(place.plan)
    cells = plan_cells(plan, part.preset)
    chosen = part.chosen(cells)
    path = results_file(place.out)
    for option, folder in (("--out", place.out), ("--runs", place.runs)):
        with needs_folder(folder, option):
            folder.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock"), wait=False), file_lock(place.runs / ".lock", wait=False):
        recorded = read_results(path)
        refuse_others(path, cells, recorded)
        done = finished(cells, [*_shared(study, place), *recorded])
        waiting = [cell for cell in chosen if cell.key not in done]
        log(f"{counted(len(chosen), 'cell')}, {len(chosen) - len(waiting)} of them finished")
        baselines = place.out / BASELINES
        if study.baselines is not None and part.minutes != 0 and not baselines.exists():
            study.baselines(baselines, cells, log)
        try:
            for result in _train(waiting, list(done.values()), place.runs, part.minutes, log):
                done[result.key] = result
                write_results(path, study.name, part.preset, cells, done.values())
                log(f"{name_of(result)}: {_summary(study, result)}")
        finally:
            results = Results(done[cell.key] for cell in cells if cell.key in done)
            write_results(path, study.name, part.preset, cells, done.values())
            changes = preset_changes(plan, part.preset)
            write_page(place.page, study, part.preset, cells, results, place.out, changes)
    return results


def require_packages(study: Study) -> None:
    """Check before hours of training that the packages for the page are there.

    Raises:
        UserError: One is missing.
    """
    needed = ["scipy", *(["sklearn"] if study.baselines is not None else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        remedy = "pip install -c constraints.txt '.[study]'"
        raise UserError(f"the study needs {listed(missing, last='and')}, which is not installed; run {remedy}")


def _train(
    cells: Sequence[Cell], done: list[CellResult], runs: Path, minutes: float | None, log: Log
) -> Iterator[CellResult]:
    """Yield the result of each cell, until the time is over. Raises UserError at the end where cells failed."""
    began_s = time.monotonic()
    failures: list[str] = []
    in_a_row = 0
    for number, cell in enumerate(cells):
        if minutes is not None and not _fits(cell, done, minutes - (time.monotonic() - began_s) / 60):
            log(f"stopped before {cell.name}, which would end after --minutes {minutes:g}; start again to continue")
            break
        if number == 0:
            check_cells(list(cells))
        log(f"training {cell.name}")
        try:
            result = run_cell(cell, runs, _analysis(cell))
        except UserError as error:
            failures.append(str(error))
            log(f"failed: {cell.name}")
            in_a_row += 1
            if in_a_row == MOST_FAILURES:
                break
            continue
        in_a_row = 0
        done.append(result)
        yield result
    if failures:
        raise UserError("\n".join([f"{counted(len(failures), 'cell')} failed:", *failures]))


def name_of(result: CellResult) -> str:
    """Name a cell for messages."""
    return ", ".join([*filter(None, (result.case, result.arm)), f"seed {result.seed}"])


def _shared(study: Study, place: Place) -> list[CellResult]:
    return [result for name in study.shares for result in read_results(results_file(place.out.parent / name))]


def _analysis(cell: Cell) -> Analysis | None:
    if not cell.analyzed:
        return None
    from dist_moe.study.grid.sequence_loads import analyze_run

    return analyze_run


def _fits(cell: Cell, done: Sequence[CellResult], minutes_left: float) -> bool:
    """Whether a cell probably ends in time: by the mean time of finished cells of the same case, or of all.

    Without a finished cell, any time that is left is enough.
    """
    times = [result.values.get("wall_s") or 0.0 for result in done if result.case == cell.case]
    times = times or [result.values.get("wall_s") or 0.0 for result in done]
    return minutes_left > (fmean(times) / 60 if times else 0.0)


def _summary(study: Study, result: CellResult) -> str:
    parts = []
    for column in study.columns:
        value = result.values.get(column.name)
        if value is not None:
            parts.append(f"{column.heading} {value * column.factor:.{column.digits}f}")
    return ", ".join([*parts, f"{result.values.get('wall_s') or 0.0:.0f} s"])


class Checked(NamedTuple):
    """A measure of a repeated cell: recorded and repeated value, and the difference that is accepted."""

    cell: str
    measure: str
    recorded: float
    repeated: float
    accepted: float

    @property
    def agrees(self) -> bool:
        """Whether the values differ by no more than what is accepted."""
        return abs(self.repeated - self.recorded) <= self.accepted


def check_study(study: Study, place: Place, recorded_in: Path, preset: str, log: Log) -> list[Checked]:
    """Train one cell of each checked arm again, in each case, and compare it with the recorded result.

    The accepted difference is `SPREADS` standard deviations over the seeds of the recorded arm, since the order of
    sums differs between machines. Times are not compared.

    Args:
        study: Which.
        place: Its files; the runs are repeated in `place.runs`.
        recorded_in: The folder with the recorded results.
        preset: Which size.
        log: Receives a line for each cell.

    Raises:
        UserError: A cell to check has no recorded result, or a run failed.
    """
    require_packages(study)
    plan = read_plan(place.plan)
    cells = plan_cells(plan, preset)
    path = results_file(recorded_in)
    recorded = Results(finished(cells, read_results(path)).values())
    by_key = {result.key: result for result in recorded.all}
    chosen = [cell for cell in cells if cell.arm in plan.checked and cell.seed == cells[0].seed]
    if missing := [cell.name for cell in chosen if cell.key not in by_key]:
        raise UserError(f"{path} has no result of {missing[0]}; finish the study before --check")
    with needs_folder(place.runs, "--runs"):
        place.runs.mkdir(parents=True, exist_ok=True)
    found: list[Checked] = []
    with file_lock(place.runs / ".lock", wait=False):
        for cell in chosen:
            log(f"training {cell.name}")
            repeated = run_cell(cell, place.runs, None)
            found += _compare(study, cell, by_key[cell.key], repeated, recorded)
    return found


def _compare(
    study: Study, cell: Cell, before: CellResult, repeated: CellResult, recorded: Results
) -> Iterator[Checked]:
    for column in study.columns:
        old, new = before.values.get(column.name), repeated.values.get(column.name)
        if old is None or new is None or column.name in TIMES:
            continue
        seeds = recorded.values(cell.case, cell.arm, column.name)
        accepted = SPREADS * (stdev(seeds) if len(seeds) > 1 else 0.0) + 1e-6 * abs(old)
        yield Checked(cell.name, column.heading, old, new, accepted)
