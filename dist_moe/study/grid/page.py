"""The page of a study: Markdown that is written from its plan and its results alone."""

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.errors import needs_folder
from dist_moe.files import write_atomically
from dist_moe.study.grid.claims import Claim, claim_lines
from dist_moe.study.grid.plan import SMALL, Cell
from dist_moe.study.grid.statistics import Results
from dist_moe.study.tables import format_mean, markdown_table
from dist_moe.text import counted

WIDTH = 120
BASELINES = "baselines.json"
Log = Callable[[str], None]


TIMES = ("wall_s", "step_ms")
"""Values that other work on the machine changes."""


@dataclass(frozen=True)
class Column:
    """One column of a table of arms.

    Attributes:
        heading: With the unit.
        name: In `CellResult.values`.
        digits: After the decimal point.
        factor: By which the value is multiplied, such as 100 for percent.
    """

    heading: str
    name: str
    digits: int
    factor: float = 1.0


@dataclass(frozen=True)
class Study:
    """A study as the command line knows it.

    Attributes:
        name: Of the command, of the plan `configs/study/NAME.yaml` and of the page.
        title: Of the page.
        introduction: Paragraphs of Markdown before the results: what is trained, and which claims are examined.
        columns: Of the table.
        claims: Judges the results.
        sections: Writes further sections of the page and draws their figures in the folder of the results.
        notes: Paragraphs after the results: how it was measured, and its limits.
        baselines: Writes results without training, such as those of a linear classifier, to `BASELINES`.
        shares: Names of studies whose finished cells this one uses where the configurations are equal.
    """

    name: str
    title: str
    introduction: str
    columns: Sequence[Column]
    claims: Callable[[Results], list[Claim]]
    sections: Callable[[Results, Path], list[str]]
    notes: str = ""
    baselines: Callable[[Path, Sequence[Cell], Log], None] | None = None
    shares: Sequence[str] = ()


def table(results: Results, case: str, columns: Sequence[Column]) -> list[str]:
    """Build a table with one row per arm: mean over seeds ± standard deviation."""
    arms = [arm for arm in results.arms if results.get(case, arm)]
    return markdown_table(
        ["arm", *(column.heading for column in columns)], [row(results, case, arm, columns) for arm in arms]
    )


def row(results: Results, case: str, arm: str, columns: Sequence[Column]) -> list[str]:
    """Build the row of an arm; of times the shortest over the seeds, which other work delayed least."""
    cells = []
    for column in columns:
        found = [result.values.get(column.name) for result in results.get(case, arm)]
        values = [None if value is None else value * column.factor for value in found]
        known = [value for value in values if value is not None]
        if column.name in TIMES and known:
            cells.append(f"{min(known):.{column.digits}f}")
        else:
            cells.append(format_mean(values, column.digits) if known else "")
    return [arm, *cells]


def write_page(
    path: Path,
    study: Study,
    preset: str,
    cells: Sequence[Cell],
    results: Results,
    folder: Path,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write the page and its figures.

    Args:
        path: Of the page.
        study: What it is about.
        preset: Of the results.
        cells: All that are planned.
        results: Of the finished ones.
        folder: For the figures, in or below that of the page.
        changes: `preset_changes`, which the texts of the study do not know of.

    Raises:
        RunFolderError: A file cannot be written.
    """
    with needs_folder(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {study.title}", "", *paragraphs(study.introduction), *preset_lines(preset, changes or {})]
    lines += [*command_lines(study, preset), *progress_lines(cells, results)]
    if results.all:
        lines += ["## What holds, and what does not", "", *claim_lines(study.claims(results))]
        lines += ["## Results", "", "Mean over the seeds ± their standard deviation; of times, the shortest.", ""]
        for case in results.cases:
            lines += [f"### {case}", ""] if case else []
            lines += [*table(results, case, study.columns), ""]
        lines += study.sections(results, folder)
        lines += ["## How it was measured", "", *paragraphs(study.notes), *origin_lines(results)]
    with needs_folder(path, "--out", "file"):
        write_atomically(path, "\n".join(lines).rstrip() + "\n")


def preset_lines(preset: str, changes: Mapping[str, Any]) -> list[str]:
    """Say by which fields the results are of other runs than the texts describe."""
    if preset == SMALL:
        return []
    fields = ", ".join(f"`{name}={json.dumps(value)}`" for name, value in changes.items())
    return paragraphs(
        f"The sizes in the texts of this page are those of the preset `{SMALL}`. The results are of the preset "
        f"`{preset}`, which has {fields or 'the same sizes'}."
    )


def command_lines(study: Study, preset: str) -> list[str]:
    """Say what to type."""
    command = f"dist-moe study {study.name.replace('_', '-')}" + ("" if preset == SMALL else f" --preset {preset}")
    calls = {
        command: f"everything from the start, in runs/study/{study.name}",
        f"{command} --out docs/study/{study.name}": "the runs that are missing here, and this page again",
        f"{command} --check": "trains the first seed of the checked arms again, and compares",
    }
    width = max(map(len, calls))
    lines = [f"{call:<{width}}  # {about}" for call, about in calls.items()]
    return ["## What to type", "", "<!-- not run: takes hours -->", "```sh", *lines, "```", ""]


def progress_lines(cells: Sequence[Cell], results: Results) -> list[str]:
    """Say how much of the plan is finished, and what is missing."""
    missing = [cell for cell in cells if not any(result.key == cell.key for result in results.all)]
    if not missing:
        return [f"All {len(cells)} runs of the plan are finished.", ""]
    text = f"{len(cells) - len(missing)} of {len(cells)} runs of the plan are finished. Not measured yet: "
    by_part = Counter((cell.case, f"seed {cell.seed}") for cell in missing)
    parts = [f"{', '.join(filter(None, part))} ({counted(number, 'run')})" for part, number in by_part.items()]
    return [*_lines(text + "; ".join(parts) + "."), ""]


def origin_lines(results: Results) -> list[str]:
    """Say on which machines, from which commits and with which seeds the results were made."""
    machines = Counter(
        f"{result.made.get('processor', '')} with {result.made.get('cores', '')} cores"
        + "".join(f", {name}" for name in result.made.get("accelerators", ()))
        for result in results.all
        if result.made
    )
    versions = Counter(
        ", ".join(
            f"{name} {result.made[name]}" for name in ("torch", "deepspeed", "transformers") if name in result.made
        )
        for result in results.all
        if result.made
    )
    commits = Counter((result.commit or "unknown")[:12] + ("+" if result.changed else "") for result in results.all)
    hours = sum(result.values.get("wall_s") or 0.0 for result in results.all) / 3600
    seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results.all}))
    text = (
        f"{counted(len(results.all), 'run')}, {hours:.1f} hours together, seeds {seeds}. Machines (runs): "
        f"{_counts(machines)}. Versions: {_counts(versions)}. Commits, with + for changed files: {_counts(commits)}."
    )
    return [*_lines(text), ""]


def _counts(counter: Counter[str]) -> str:
    return "; ".join(f"{name} ({number})" for name, number in counter.most_common())


def paragraphs(text: str) -> list[str]:
    """Wrap paragraphs that are separated by empty lines; lists and tables keep their lines."""
    lines: list[str] = []
    for part in textwrap.dedent(text).strip().split("\n\n"):
        if not part:
            continue
        kept = part.lstrip().startswith(("- ", "|", "```", "#"))
        lines += [*(part.split("\n") if kept else _lines(" ".join(part.split()))), ""]
    return lines


def _lines(text: str) -> list[str]:
    # A line break after a hyphen would become a space.
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)
