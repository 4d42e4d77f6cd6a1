"""The tables of the study of controllers: for each layer size and policy, means over seeds and their spread."""

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from dist_moe.study.controllers.measures import NEAR, TOLERANCE, WINDOW, Convergence, Measures
from dist_moe.study.controllers.simulation import LayerSize, Plan, Run
from dist_moe.study.tables import format_mean, markdown_table, terminal_table
from dist_moe.text import counted

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


def table_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Build one row for each policy of one layer size, with the columns of `HEADINGS`."""
    names = dict.fromkeys(run.variant.name for run in runs)
    return [[name, *_cells([run.measures for run in runs if run.variant.name == name])] for name in names]


def captions(plan: Plan, runs: Sequence[Run]) -> dict[int, str]:
    """Describe each layer size in a line, by its number of experts."""
    return {size.experts: _caption(size, [run for run in runs if run.experts == size.experts]) for size in plan.sizes}


def _caption(size: LayerSize, runs: Sequence[Run]) -> str:
    top_k = [run.measures for run in runs if run.variant.selection == "top_k" and not run.variant.unequal_shares]
    threshold, thresholds = (
        [run.measures for run in runs if run.variant.selection == selection]
        for selection in ("threshold", "expert_threshold")
    )
    shares = fmean(run.measures.floor for run in runs if run.variant.unequal_shares)
    first = format_mean([measures.experts_first for measures in threshold], 1)
    steady = format_mean([measures.experts_steady for measures in threshold], 1)
    floor, threshold_floor, thresholds_floor = (
        fmean(measures.floor for measures in group) for group in (top_k, threshold, thresholds)
    )
    average = format_mean([measures.experts_steady for measures in thresholds], 2)
    return (
        f"{size.experts} experts, top-{size.top_k}, {size.tokens:,} tokens per step: floor {floor:.3f} (formula "
        f"{size.floor:.3f}). Threshold routing: {first} experts per token at first, {steady} later, "
        f"{size.threshold_tokens:,} tokens per step, floor {threshold_floor:.3f}. Expert thresholds: {average} experts "
        f"per token, floor {thresholds_floor:.3f}. Unequal shares: floor {shares:.3f} (formula)."
    )


def notes(plan: Plan) -> list[str]:
    """Explain the columns."""
    return [
        f"Columns `to`: updates until MaxVio is at most {NEAR:g} times the floor, or the floor + {TOLERANCE:g}, in one "
        f"step and in the median of it and the next {WINDOW - 1}. The shift comes after {plan.before} steps, and "
        f"{plan.after} follow; `never` means not within them, and `(2 of 3)` counts the seeds that reached it.",
        "Floor: the mean MaxVio of the same selection on the same noise without offsets. Formula: the value of "
        "`max_vio_floor`. With shares, MaxVio is measured against them, and the floor is the formula's.",
        "Theory, for the sign rules: (largest - smallest required change of the biases) / (2 rate).",
        "Ripple: MaxVio - floor, mean of the last quarter of the steps before the shift. In time: its standard "
        "deviation over those steps.",
        f"All values are means over {counted(plan.seeds, 'seed')}, and after ± the standard deviation over them.",
        "The policy auxiliary and the orthogonality loss are not included: they act through gradients, and this study "
        "trains no model.",
    ]


def terminal_tables(plan: Plan, runs: Sequence[Run]) -> list[Table]:
    """Build one table per layer size for the terminal."""
    return [
        terminal_table(caption, HEADINGS, table_rows([run for run in runs if run.experts == experts]))
        for experts, caption in captions(plan, runs).items()
    ]


def markdown(plan: Plan, runs: Sequence[Run]) -> str:
    """Build the same tables as Markdown, followed by the notes."""
    lines = []
    for experts, caption in captions(plan, runs).items():
        rows = table_rows([run for run in runs if run.experts == experts])
        lines += [caption, "", *markdown_table(HEADINGS, rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(plan)), ""])


def _cells(measures: Sequence[Measures]) -> list[str]:
    return [
        *_convergence_cells([of_seed.start for of_seed in measures]),
        format_mean([of_seed.ripple for of_seed in measures], 3),
        f"{fmean(of_seed.ripple_std for of_seed in measures):.3f}",
        *_convergence_cells([of_seed.shift for of_seed in measures]),
    ]


def _convergence_cells(by_seed: Sequence[Convergence]) -> list[str]:
    predicted = [of_seed.predicted for of_seed in by_seed]
    return [
        format_mean([of_seed.near for of_seed in by_seed]),
        format_mean([of_seed.at_floor for of_seed in by_seed]),
        "" if None in predicted else format_mean(predicted),
    ]
