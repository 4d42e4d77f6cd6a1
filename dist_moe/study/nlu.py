"""The study of adaptive expert weights on language understanding (Front. Neurorobotics 19:1590994)."""

import re
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.study.baselines import write_baselines
from dist_moe.study.grid.claims import (
    Claim,
    Measure,
    below,
    difference_below,
    equal_within,
    equal_within_cases,
    lower_by_factor,
)
from dist_moe.study.grid.page import BASELINES, Column, Study, paragraphs
from dist_moe.study.grid.statistics import Results, compare_examples, proportion_interval
from dist_moe.study.tables import markdown_table
from dist_moe.untrusted import read_json

TOP_2 = "top-2"
TOP_2_BALANCED = "top-2 + loss-free"
THRESHOLD = "threshold 0.4"
WEIGHTS = "threshold 0.4 + weights 0.1"
BUDGET = "budget 1.8 + weights 0.1"
CENTERED = "budget 1.8, centered router"
DENSE = "dense"
FACTOR = 10.0
MARGIN = 1.0
"""Percentage points of accuracy: a difference below it counts as none."""
ACCURACY = Measure("accuracy", 2, " points", factor=100.0)
DEVIATION = Measure("load_deviation_percent", 2, " %")
EXPERTS = Measure("experts_per_token", 2)

INTRODUCTION = """
The paper of adaptive expert weights fine-tunes MoE models on tasks of language understanding and states that threshold
routing with adaptive weights is as accurate as top-2, takes fewer experts per token, and lowers the standard deviation
of the load about ten times (12.25 % to 1.18 % on MNLI). Its equations were not available: the rule here is a
[reconstruction](../routing.md). GLUE cannot be downloaded everywhere, so four tasks of the same kinds take its place:
the sentiment of reviews (like SST-2), the topic of news (like AG News), whether a sentence supports a claim (like
MNLI), and whether a sentence answers a question (like QNLI). MiniLM, an encoder of six layers, is
[upcycled](../upcycling.md): the feed-forward blocks of its last two layers become eight experts each, and the four
layers before them are not trained.
"""
NOTES = """
Accuracy, load and experts per token are those of held-out examples after the last step (at most 1,200 of a task, which
are split off by film, page or paragraph, never by position). A run reads 1,920 examples once. The 95 % interval of an
accuracy is Wilson's, of one run; it takes the examples as independent, and those of one film, page or paragraph are
not, so it is too narrow, most of all for vitaminc, whose 7,397 held-out pairs are of 295 pages. bbc_news has 257
held-out articles. A text is cut to its first 64 (reviews) or 96 tokens: 7 % of the pairs of vitaminc, 4 % of qnli_like
and all articles are. Intervals of differences are of Student's t over seeds, of the mean over the tasks,
paired by seed. The load deviation is the standard deviation of the experts' shares of the assignments, in percent of
them, which is the paper's measure; its floor is the value under uniform random routing. Rates and thresholds are those
of a prototype on one of the tasks; nothing was chosen by the numbers of this page. For accuracies the tasks are fixed,
and the variance over seeds is pooled within them (Student's t with tasks times seeds less tasks degrees of freedom).
"""
BASELINE_TEXT = """
Accuracy of a logistic regression on TF-IDF of words and pairs of words in whole texts, trained on as many examples as a
run reads (few), and on all; it is evaluated on all held-out examples, also where the runs are evaluated on 1,200 of
them. Next to it are the runs, mean over the seeds. Where these are not above the linear classifier of as many examples,
an equal accuracy of two of them says little about the task.
"""
PAIRED_TEXT = """
Threshold routing with weights and top-2, compared by the held-out examples that only one of them has right, by seed:
the difference in accuracy with its 95 % interval, and McNemar's exact test. It tells how much the choice of held-out
examples adds to the noise; like the intervals of single runs it takes the examples as independent.
"""
CONTROLS = """
Three controls tell what adaptive weights are needed for. *Top-2 with a bias* is balanced without them. A *budget* takes
the same number of experts with and without weights, since weights alone raise the number that a fixed threshold gives.
And a *centered router*, whose rows are orthogonal to the mean token at the start, removes the imbalance that the mean
direction of an encoder's states causes, without any balancing; its logits are smaller, so that a token takes more
experts at a fixed threshold, and it is compared at a budget.
"""


def claims(results: Results) -> list[Claim]:
    """Judge the claims of the paper, and the controls."""
    found = [
        lower_by_factor(
            results,
            f"{case}: adaptive weights lower the load deviation at least tenfold",
            case,
            WEIGHTS,
            THRESHOLD,
            DEVIATION,
            FACTOR,
        )
        for case in results.cases
    ]
    as_accurate = partial(equal_within_cases, results, measure=ACCURACY, margin=MARGIN)
    lower = partial(difference_below, results, limit=0.0)
    return [
        *found,
        below(
            results, "The load deviation with adaptive weights is below the paper's 1.18 %", WEIGHTS, DEVIATION, 1.18
        ),
        as_accurate(f"Adaptive weights are as accurate as top-2 within {MARGIN:g} point", WEIGHTS, TOP_2),
        as_accurate(f"They are as accurate as threshold routing alone within {MARGIN:g} point", WEIGHTS, THRESHOLD),
        below(results, "A token takes fewer than 2 experts with adaptive weights", WEIGHTS, EXPERTS, 2.0),
        lower(
            "The deviation with weights is lower than with the auxiliary loss",
            WEIGHTS,
            f"{THRESHOLD} + auxiliary loss",
            DEVIATION,
        ),
        lower("Control: at equal experts per token, weights lower the deviation", BUDGET, "budget 1.8", DEVIATION),
        equal_within(
            results,
            "Control: both budgets take equally many experts within 0.1",
            BUDGET,
            "budget 1.8",
            EXPERTS,
            margin=0.1,
        ),
        lower(
            "Control: top-2 with a bias has a higher deviation than adaptive weights",
            WEIGHTS,
            TOP_2_BALANCED,
            DEVIATION,
        ),
        lower(
            "Control: at equal experts per token, a centered router alone has a higher deviation than adaptive weights",
            BUDGET,
            CENTERED,
            DEVIATION,
        ),
        as_accurate(f"The MoE model (top-2) is as accurate as the dense one within {MARGIN:g} point", TOP_2, DENSE),
    ]


def sections(results: Results, folder: Path) -> list[str]:
    """Write the figure, the intervals of the accuracies, and the controls."""
    _draw(folder / "nlu.png", results)
    rows: list[list[str]] = []
    for case in results.cases:
        for arm in results.arms:
            rows += _accuracy_rows(results, case, arm)
    return [
        "### Accuracy against load deviation\n",
        f"![Accuracy against load deviation of each run]({folder.name}/nlu.png)\n",
        *paragraphs(CONTROLS),
        *_baseline_lines(folder / BASELINES, results),
        *_paired_lines(results),
        "### Accuracy of each run\n",
        *markdown_table(["task, arm", "seed", "accuracy, %", "95 % interval", "deviation, %"], rows),
        "",
    ]


def _baseline_lines(path: Path, results: Results) -> list[str]:
    if not path.exists():
        return []
    baselines = read_json(path)
    arms = {DENSE: "dense, %", TOP_2: "top-2, %", WEIGHTS: "weights 0.1, %"}
    rows = [
        [
            case,
            *(f"{100 * found[name]:.1f}" for name in ("majority", "linear_few", "linear")),
            *(f"{100 * fmean(runs):.1f}" if (runs := results.values(case, arm, "accuracy")) else "" for arm in arms),
            f"{found['few']:,}",
            f"{found['examples']:,}",
            f"{found['held_out']:,}",
        ]
        for case, found in baselines.items()
    ]
    headings = ["task", "majority class, %", "TF-IDF, few, %", "TF-IDF, all, %", *arms.values()]
    headings += ["few", "all", "held-out examples"]
    return ["### Baselines\n", *paragraphs(BASELINE_TEXT), *markdown_table(headings, rows), ""]


def _paired_lines(results: Results) -> list[str]:
    rows = []
    for case in results.cases:
        for seed in results.pairs(case, WEIGHTS, TOP_2, "accuracy"):
            first, second = (_correct_examples(results, case, arm, seed) for arm in (WEIGHTS, TOP_2))
            if first is None or second is None or first[1] != second[1] or len(first[0]) != len(second[0]):
                continue
            found = compare_examples(first[0], second[0], first[1])
            difference = f"{100 * found.difference:+.2f} ± {100 * found.half_width:.2f}"
            rows.append(
                [case, str(seed), str(found.only_first), str(found.only_second), difference, f"{found.p_value:.2f}"]
            )
    if not rows:
        return []
    headings = ["task", "seed", "only weights right", "only top-2 right", "difference, points", "p"]
    return ["### Compared by example\n", *paragraphs(PAIRED_TEXT), *markdown_table(headings, rows), ""]


def _correct_examples(results: Results, case: str, arm: str, seed: int) -> tuple[str, int] | None:
    """Return which examples a run has right, and their number."""
    for result in results.get(case, arm):
        evaluation, count = result.loads.get("evaluation"), result.values.get("examples")
        correct = evaluation.get("correct_examples") if isinstance(evaluation, dict) else None
        if (
            result.seed != seed
            or count is None
            or not isinstance(correct, str)
            or not re.fullmatch("[0-9a-f]+", correct)
        ):
            continue
        if 0 < int(count) <= 4 * len(correct):
            return correct, int(count)
    return None


def _accuracy_rows(results: Results, case: str, arm: str) -> list[list[str]]:
    rows = []
    for result in results.get(case, arm):
        accuracy, count = result.values.get("accuracy"), result.values.get("examples")
        if accuracy is None or not count:
            continue
        low, high = proportion_interval(accuracy, int(count))
        deviation = result.values.get("load_deviation_percent")
        shown = "" if deviation is None else f"{deviation:.2f}"
        rows.append(
            [f"{case}, {arm}", str(result.seed), f"{100 * accuracy:.2f}", f"{100 * low:.1f} to {100 * high:.1f}", shown]
        )
    return rows


def _draw(path: Path, results: Results) -> None:
    figure = Figure(figsize=(11.0, 4.0 * max(1, (len(results.cases) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(max(1, (len(results.cases) + 1) // 2), 2, squeeze=False)
    shown = {
        TOP_2: ("#000000", "X"),
        TOP_2_BALANCED: ("#56B4E9", "s"),
        THRESHOLD: ("#D55E00", "v"),
        f"{THRESHOLD} + auxiliary loss": ("#E69F00", "^"),
        WEIGHTS: ("#0072B2", "o"),
        BUDGET: ("#009E73", "D"),
        CENTERED: ("#CC79A7", "P"),
    }
    for axes, case in zip(grid.flat, results.cases, strict=False):
        for arm, (color, marker) in shown.items():
            pairs = results.pairs(case, arm, arm, "accuracy")
            deviations = results.pairs(case, arm, arm, "load_deviation_percent")
            points = [(deviations[seed][0], 100 * pairs[seed][0]) for seed in pairs if seed in deviations]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, color=color, marker=marker, s=36, alpha=0.8, label=arm)
        if dense := results.values(case, DENSE, "accuracy"):
            axes.axhline(100 * fmean(dense), color="gray", linewidth=1, linestyle=":", label="dense, mean")
        if floors := results.values(case, WEIGHTS, "load_deviation_percent_floor"):
            axes.axvline(fmean(floors), color="gray", linewidth=1, linestyle="--", label="floor of the deviation")
        axes.set_title(case, fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("load deviation, %, mean over layers")
        axes.set_ylabel("accuracy, %")
        axes.grid(True, linewidth=0.4, alpha=0.6)
    for axes in grid.flat[len(results.cases) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


STUDY = Study(
    name="nlu",
    title="Adaptive expert weights on language understanding",
    introduction=INTRODUCTION,
    columns=(
        Column("accuracy, %", "accuracy", 2, factor=100.0),
        Column("macro-F1, %", "macro_f1", 2, factor=100.0),
        Column("deviation, %", "load_deviation_percent", 2),
        Column("worst layer", "load_deviation_percent_worst", 2),
        Column("floor", "load_deviation_percent_floor", 2),
        Column("CoV", "load_cov", 3),
        Column("experts per token", "experts_per_token", 2),
        Column("run, s", "wall_s", 0),
    ),
    claims=claims,
    sections=sections,
    notes=NOTES,
    baselines=write_baselines,
)
