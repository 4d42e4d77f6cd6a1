"""The figure of the study of controllers: MaxVio over steps on log axes, one row per layer size."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from dist_moe.study.controllers.simulation import Plan, Run
from dist_moe.study.controllers.variants import Selection

Dash = Literal["-", "--", ":"]
# The colors of Okabe and Ito, which are distinct to color-blind readers; one hue for each kind of policy.
STYLES: dict[str, tuple[str, Dash]] = {
    "none": ("#666666", "-"),
    "sign, 0.001": ("#0072B2", "-"),
    "sign, 0.01": ("#56B4E9", "-"),
    "sign x score, 0.001": ("#0072B2", ":"),
    "proportional, 0.01": ("#E69F00", "-"),
    "adaptive, 0.1": ("#009E73", "-"),
    "adaptive threshold, 0.1": ("#009E73", ":"),
    "adaptive, 0.1, shares": ("#009E73", "--"),
    "momentum, 0.01": ("#56B4E9", "--"),
    "quantile, sigmoid": ("#D55E00", "-"),
    "quantile, softmax": ("#CC79A7", "--"),
    "EMA quantile, sigmoid": ("#D55E00", "--"),
    "expert threshold": ("#CC79A7", ":"),
}
FLOORS: dict[Selection, tuple[Dash, str]] = {
    "top_k": ("--", "floor of top-K"),
    "threshold": (":", "floor of threshold"),
    "expert_threshold": ("-", "floor of expert thresholds"),
}
BINS = 40


def draw_figure(path: Path, plan: Plan, runs: Sequence[Run]) -> None:
    """Write a PNG with the steps from the start on the left, and those after the shift on the right.

    A line is the mean over the seeds and over 40 bins of steps of equal width on the log axis.
    """
    figure = Figure(figsize=(11, 1.6 + 3.1 * len(plan.sizes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(plan.sizes), 2, sharey="row", squeeze=False)
    for size, (left, right) in zip(plan.sizes, grid, strict=True):
        of_size = [run for run in runs if run.experts == size.experts]
        _draw_steps(left, of_size, slice(0, plan.before))
        _draw_steps(right, of_size, slice(plan.before, plan.before + plan.after))
        left.set_ylabel("MaxVio")
        left.set_title(f"{size.experts} experts, top-{size.top_k}, {size.tokens:,} tokens per step", fontsize=11)
        right.set_title(f"after the shift at step {plan.before}", fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    lines = [Line2D([], [], color=color, linestyle=dash, label=name) for name, (color, dash) in STYLES.items()]
    for dash, label in FLOORS.values():
        lines.append(Line2D([], [], color="black", linestyle=dash, linewidth=1, label=label))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def binned(series: Sequence[float], bins: int = BINS) -> tuple[list[float], list[float]]:
    """Average a series over bins of equal width on a log axis.

    Returns:
        Steps, counted from 1, and values; bins without a step are omitted.
    """
    values = np.asarray(series)
    edges = np.unique(np.geomspace(1, len(values) + 1, bins + 1).round().astype(int))
    parts = [np.arange(begin, end) for begin, end in itertools.pairwise(edges)]
    return [float(np.exp(np.log(part).mean())) for part in parts], [float(values[part - 1].mean()) for part in parts]


def _draw_steps(axes: Axes, runs: Sequence[Run], part: slice) -> None:
    for name, (color, dash) in STYLES.items():
        series = np.mean([run.max_vio[part] for run in runs if run.variant.name == name], axis=0)
        axes.plot(*binned(series.tolist()), color=color, linestyle=dash, linewidth=1.4)
    for selection, (dash, _) in FLOORS.items():
        of_selection = [run for run in runs if run.variant.selection == selection and not run.variant.unequal_shares]
        floor = np.mean([run.measures.floor for run in of_selection])
        axes.axhline(float(floor), color="black", linestyle=dash, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(True, linewidth=0.4, alpha=0.6)
