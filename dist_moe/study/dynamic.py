"""The study of threshold routing at equal experts per token and at equal time (Huang et al. 2024, arXiv 2403.07652)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.study.grid.claims import Claim, Measure, below, difference_below, equal_within, judge
from dist_moe.study.grid.page import Column, Study, paragraphs
from dist_moe.study.grid.statistics import Results
from dist_moe.study.tables import markdown_table

TOP_K = ("top-1", "top-2", "top-3", "top-4")
THRESHOLDS = ("threshold 0.3", "threshold 0.4", "threshold 0.5")
BUDGETS = ("budget 1.5", "budget 2", "budget 3")
STEPS, SHORTER, LONGER = 200, 130, 270
LENGTHS = {arm: (SHORTER, STEPS, LONGER) for arm in ("top-2", "budget 2")}
"""Steps of the arms that are trained for several; all others for `STEPS`."""
SERIES = {
    "top-K": ("#0072B2", "o", TOP_K),
    "threshold": ("#D55E00", "v", THRESHOLDS),
    "budget": ("#E69F00", "^", BUDGETS),
}
"""Color (Okabe and Ito), marker and arms of each series of the figure."""
LOSS = Measure("validation_loss", 4, " nats")
EXPERTS = Measure("experts_per_token", 3)
MARGIN = 0.01

INTRODUCTION = """
Threshold routing gives a token as many experts as it needs until their probability passes a threshold. Its paper
trains large models and states that fewer experts per token then give better results than top-2. Here a
small model is trained with both, and asked twice: what is the loss at *equal experts per token* (which is equal work
in the experts), and what is it at *equal time*? A *budget* is threshold routing with a controller that moves the
threshold until a token takes the given number of experts on average; *threshold* keeps the threshold fixed, and the
number of experts follows from the router. Both are balanced by adaptive expert weights, top-K by Loss-Free Balancing.
"""
NOTES = """
Loss and experts per token are those of the whole held-out text after the last step. The loss of top-K between whole
numbers of experts is interpolated linearly between the arms, by seed, and that of fixed thresholds between theirs. The
time of a run is the median of its step times multiplied by its steps: it leaves out the start, and a few steps that
other work on the machine delayed; the arms ran one after the other, so their times compare only on a machine without
other work. A schedule of the learning rate belongs to each number of steps, so that each run is complete. At equal time
a budget is read between its runs of 130, 200 and 270 steps by a line in the logarithm of the time, and not beyond them.
Top-1 has gate weights that are not normalized, since a normalized weight of one expert is 1 and teaches the router
nothing.
"""
TIME = """
Seconds of training against loss, mean over seeds. The lines join runs of 130, 200 and 270 steps.
"""


def claims(results: Results) -> list[Claim]:
    """Judge what threshold routing gives."""
    lower = partial(difference_below, results, limit=0.0)
    return [
        _at_equal_experts(results, "threshold 0.4", TOP_K, "top-K"),
        _at_equal_experts(results, "budget 2", TOP_K, "top-K"),
        *(_at_equal_experts(results, budget, THRESHOLDS, "fixed thresholds") for budget in BUDGETS),
        _at_equal_time(results),
        lower("At a budget of 2 experts, the loss is lower than that of top-2", "budget 2", "top-2", LOSS),
        lower("The same with the same gate (softmax) in both", "budget 2", "top-2, softmax gate", LOSS),
        equal_within(
            results, "A budget reaches its experts per token within 0.05", "budget 2", "top-2", EXPERTS, margin=0.05
        ),
        below(
            results,
            "A fixed threshold of 0.4 takes fewer than 2 experts per token",
            "threshold 0.4",
            EXPERTS,
            limit=2.0,
        ),
        difference_below(
            results,
            f"At threshold 0.4 adaptive weights, with which a token takes more experts, cost less than {MARGIN} nats",
            "threshold 0.4",
            "threshold 0.4, no balancing",
            LOSS,
            limit=MARGIN,
        ),
    ]


def loss_at(results: Results, arms: Sequence[str], seed: int, experts: float) -> float | None:
    """Interpolate the loss of arms of one seed at a number of experts per token; None beyond the arms."""
    points = []
    for arm in arms:
        for result in results.get("", arm):
            loss, taken = result.values.get("validation_loss"), result.values.get("experts_per_token")
            if result.seed == seed and loss is not None and taken is not None:
                points.append((taken, loss))
    points.sort()
    if len(points) < 2 or not points[0][0] <= experts <= points[-1][0]:
        return None
    taken_A, loss_A = np.array(points).T
    return float(np.interp(experts, taken_A, loss_A))


def _at_equal_experts(results: Results, arm: str, others: Sequence[str], name: str) -> Claim:
    text = f"At equal experts per token, the loss of {arm} is lower than that of {name}"
    found = []
    for result in results.get("", arm):
        experts, loss = result.values.get("experts_per_token"), result.values.get("validation_loss")
        other = None if experts is None else loss_at(results, others, result.seed, experts)
        if loss is not None and other is not None:
            found.append(loss - other)
    return judge(text, found, LOSS)


def time_s(results: Results, arm: str, steps: int) -> dict[int, float]:
    """Return the training time of the runs of an arm in seconds, by seed."""
    return {
        result.seed: step_ms * steps / 1000
        for result in results.get("", arm)
        if (step_ms := result.values.get("step_ms")) is not None
    }


def _at_equal_time(results: Results) -> Claim:
    text = "At the time that top-2 takes for 200 steps, the loss of budget 2 is lower than that of top-2"
    points: dict[int, list[tuple[float, float]]] = {}
    for name, steps in _lengths("budget 2"):
        times = time_s(results, name, steps)
        for result in results.get("", name):
            loss = result.values.get("validation_loss")
            if loss is not None and result.seed in times:
                points.setdefault(result.seed, []).append((times[result.seed], loss))
    found = []
    for seed, seconds in time_s(results, "top-2", STEPS).items():
        known = sorted(points.get(seed, []))
        losses = results.pairs("", "top-2", "top-2", "validation_loss")
        # No extrapolation: the time must be within those of the runs.
        if len(known) > 1 and known[0][0] <= seconds <= known[-1][0] and seed in losses:
            slope, level = np.polyfit(np.log([time for time, _ in known]), [loss for _, loss in known], 1)
            found.append(float(slope * np.log(seconds) + level) - losses[seed][0])
    return judge(text, found, LOSS)


def _lengths(arm: str) -> list[tuple[str, int]]:
    """The names of the arms of one kind with their steps."""
    return [(arm if steps == STEPS else f"{arm}, {steps} steps", steps) for steps in LENGTHS[arm]]


def sections(results: Results, folder: Path) -> list[str]:
    """Write the figure, and the table of times."""
    _draw(folder / "dynamic.png", results)
    rows = []
    for arm in LENGTHS:
        for name, steps in _lengths(arm):
            if (times := time_s(results, name, steps)) and (losses := results.values("", name, "validation_loss")):
                rows.append([name, str(steps), f"{fmean(times.values()):.0f}", f"{fmean(losses):.4f}"])
    return [
        "### At equal experts per token, and at equal time\n",
        f"![Loss against experts per token and against time]({folder.name}/dynamic.png)\n",
        *paragraphs(TIME),
        *markdown_table(["arm", "steps", "training, s", "loss, nats per token"], rows),
        "",
    ]


def _draw(path: Path, results: Results) -> None:
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    experts, time = figure.subplots(1, 2, sharey=True)
    for label, (color, marker, arms) in SERIES.items():
        means = []
        for arm in arms:
            points = [
                (taken, loss)
                for result in results.get("", arm)
                if (taken := result.values.get(EXPERTS.name)) is not None
                and (loss := result.values.get(LOSS.name)) is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                experts.scatter(x, y, color=color, marker=marker, s=18, alpha=0.6)
                means.append((fmean(x), fmean(y)))
        if means:
            experts.plot(*zip(*means, strict=True), color=color, linewidth=1.2, label=label)
    for arm, color in (("top-2", "#0072B2"), ("budget 2", "#E69F00")):
        curve = [
            (fmean(times.values()), fmean(losses))
            for name, steps in _lengths(arm)
            if (times := time_s(results, name, steps)) and (losses := results.values("", name, LOSS.name))
        ]
        if curve:
            time.plot(*zip(*curve, strict=True), color=color, marker="o", label=arm)
    experts.set_xlabel("experts per token on held-out text")
    experts.set_ylabel("loss on held-out text, nats per token")
    time.set_xlabel("training time, s")
    for axes in (experts, time):
        axes.grid(True, linewidth=0.4, alpha=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


STUDY = Study(
    name="dynamic",
    title="What threshold routing gives at equal experts per token, and at equal time",
    introduction=INTRODUCTION,
    columns=(
        Column("loss, nats per token", "validation_loss", 4),
        Column("experts per token", "experts_per_token", 3),
        Column("MaxVio", "max_vio_global", 3),
        Column("floor", "max_vio_global_floor", 3),
        Column("deviation, %", "load_deviation_percent", 2),
        Column("step, ms", "step_ms", 0),
    ),
    claims=claims,
    sections=sections,
    notes=NOTES,
)
