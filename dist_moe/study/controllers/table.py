"""The table of the study of controllers: for each size and policy, means over seeds and their spread."""

from collections.abc import Sequence
from statistics import fmean, stdev

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dist_moe.study.controllers import Plan, Run
from dist_moe.study.measures import NEAR, TOLERANCE, WINDOW, Measures, Stretch

HEADINGS = (
    "policy",
    f"to {NEAR:g}x",
    f"to +{TOLERANCE:g}",
    "theory",
    "ripple",
    "in time",
    f"shift to {NEAR:g}x",
    f"shift to +{TOLERANCE:g}",
    "shift theory",
)
EXPERTS = ("experts_first", "experts_steady")


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row for each contender of one size, as `HEADINGS` says."""
    names = dict.fromkeys(run.contender.name for run in runs)
    return [[name, *_cells([run.measures for run in runs if run.contender.name == name])] for name in names]


def captions(plan: Plan, runs: Sequence[Run]) -> dict[int, str]:
    """A line about each size, by its number of experts."""
    lines = {}
    for size in plan.sizes:
        of_size = [run for run in runs if run.experts == size.experts]
        by_top_k, by_threshold = (
            [run.measures for run in of_size if run.contender.by_threshold is there] for there in (False, True)
        )
        first, steady = (spread([getattr(one, name) for one in by_threshold], 1) for name in EXPERTS)
        floor, threshold_floor = (fmean(one.floor for one in measures) for measures in (by_top_k, by_threshold))
        lines[size.experts] = (
            f"{size.experts} experts, {size.top_k} a token, {size.tokens:,} tokens a step: floor {floor:.3f} (formula "
            f"{size.floor:.3f}). Threshold routing: {first} experts a token at first, {steady} later, "
            f"{size.threshold_tokens:,} tokens a step, floor {threshold_floor:.3f}."
        )
    return lines


def notes(plan: Plan) -> list[str]:
    """What a reader of the table has to know."""
    return [
        f"Columns `to`: updates until MaxVio is at most {NEAR:g} times the floor, or the floor + {TOLERANCE:g}, in one "
        f"step and in the median of it and the next {WINDOW - 1}. The shift comes after {plan.before} steps, and "
        f"{plan.after} follow; `never` is not within them, and `(2 of 3)` counts the seeds that got there.",
        "Floor: the mean MaxVio of the same selection over the same noise without offsets. Formula: the value that "
        "`max_vio_floor` gives for it.",
        "Theory, for the sign rules: (greatest - least change that the biases need) / (2 rate).",
        "Ripple: MaxVio - floor, mean of the last quarter of the steps before the shift. In time: its standard "
        "deviation over those steps.",
        f"All are means over {plan.seeds} seed(s), and after ± the standard deviation over them.",
        "The policy auxiliary is left out: it works by gradients, and here is nothing to train.",
    ]


def terminal_tables(plan: Plan, runs: Sequence[Run]) -> list[Table]:
    """One table for each size."""
    tables = []
    for experts, caption in captions(plan, runs).items():
        cells = rows([run for run in runs if run.experts == experts])
        tables.append(fitted_table(caption, HEADINGS, cells))
    return tables


def fitted_table(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal; a narrow one breaks its cells between words, never inside a number."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column(headings[0], no_wrap=True)
    for heading, *column in list(zip(headings, *cells, strict=True))[1:]:
        longest = max(len(word) for cell in (heading, *column) for word in cell.split())
        table.add_column(heading, justify="right", min_width=longest)
    for row in cells:
        table.add_row(*row)
    return table


def markdown(plan: Plan, runs: Sequence[Run]) -> str:
    """The same for a page, with the notes below."""
    lines = []
    for experts, caption in captions(plan, runs).items():
        lines += [caption, "", f"| {' | '.join(HEADINGS)} |", f"|---|{'---:|' * (len(HEADINGS) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows([run for run in runs if run.experts == experts])]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in notes(plan)), ""])


def spread(values: Sequence[float | None], digits: int = 0) -> str:
    """`95 ±3`; `95 ±3 (2 of 3)` where one is None; `never` where all are."""
    found = [value for value in values if value is not None]
    if not found:
        return "never"
    text = f"{fmean(found):.{digits}f}"
    if len(found) > 1:
        text += f" ±{stdev(found):.{digits}f}"
    return text if len(found) == len(values) else f"{text} ({len(found)} of {len(values)})"


def _cells(measures: Sequence[Measures]) -> list[str]:
    return [
        *_stretch_cells([one.start for one in measures]),
        spread([one.ripple for one in measures], 3),
        f"{fmean(one.ripple_std for one in measures):.3f}",
        *_stretch_cells([one.shift for one in measures]),
    ]


def _stretch_cells(stretches: Sequence[Stretch]) -> list[str]:
    predicted = [one.predicted for one in stretches]
    return [
        spread([one.near for one in stretches]),
        spread([one.at for one in stretches]),
        "" if None in predicted else spread(predicted),
    ]
