"""The study of Loss-Free Balancing on mixed text (Wang et al. 2024, arXiv 2408.15664)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.study.grid.claims import Claim, Measure, difference_below, equal_within, judge, lower_by_factor
from dist_moe.study.grid.page import Column, Study, paragraphs
from dist_moe.study.grid.statistics import Results
from dist_moe.study.grid.store import CellResult
from dist_moe.study.tables import format_mean, markdown_table

NONE = "none"
NONE_SOFTMAX = "none, softmax gate"
RATES = ("loss-free, sign 0.001", "loss-free, sign 0.005", "loss-free, sign 0.02")
LOSS_FREE = RATES[1]
AUXILIARY = ("auxiliary 1e-2, {}", "auxiliary 1e-3, {}", "auxiliary 1e-4, {}")
MICRO = tuple(name.format("micro-batch") for name in AUXILIARY)
GLOBAL = tuple(name.format("global batch") for name in AUXILIARY)
SOFTMAX = "loss-free, softmax gate, proportional 0.05"
FAMILIES = {
    "no balancing": ("#000000", "X", (NONE, NONE_SOFTMAX)),
    "auxiliary loss, micro-batch": ("#D55E00", "v", MICRO),
    "auxiliary loss, global batch": ("#E69F00", "^", GLOBAL),
    "loss-free, sign": ("#0072B2", "o", RATES),
    "loss-free, other forms": (
        "#56B4E9",
        "s",
        (
            "loss-free, proportional 0.02",
            "loss-free, multiplicative 0.01",
            "loss-free, softmax gate, sign 0.02",
            SOFTMAX,
        ),
    ),
    "quantile": ("#009E73", "D", ("quantile",)),
}
"""Color (Okabe and Ito), marker and arms of each series of the figures."""
SHOWN = {NONE: "#000000", MICRO[0]: "#D55E00", GLOBAL[0]: "#E69F00", LOSS_FREE: "#0072B2", "quantile": "#009E73"}
"""Arms and their colors in figures of lines."""
LOSS = Measure("validation_loss", 4, " nats")
MAX_VIO = Measure("max_vio_global", 3)
BALANCED_BY = 5.0
MARGIN = 0.01
"""Nats per token: a difference of losses below it counts as none."""

INTRODUCTION = """
The paper trains DeepSeekMoE models of 1 and 3 billion parameters and states that a bias per expert, moved by the sign
of its load error, balances the experts better than an auxiliary loss, at a lower loss; that a softmax gate is served as
well as a sigmoid; and that the batch over which the balance holds, the computation batch, grows with expert
parallelism, so that the imbalance of a computation batch shrinks. Here the same is asked of a small model of this
shape (three MoE layers of 16 fine-grained experts, of which a token takes four, and a shared expert) on text of six
domains: Python code, drama, news, fiction, learned and other prose. All arms of a seed have the same initial weights
and read the same text in the same order.
"""
COMPUTATION = """
The final models on the held-out text. Sequences are joined in random order into batches of the size that an
expert-parallel group of so many ranks computes at once, with 8 sequences of 128 tokens on each rank.
"""
NOTES = """
Loss and load are those of the whole held-out text after the last step (MaxVio_global), which no step has seen. The load
deviation is the standard deviation of the experts' shares of the assignments, in percent of them. A floor is the
expected value under uniform random routing. MaxVio by batch is that of each optimizer step's global batch over the
second half of training. Intervals are of Student's t over seeds, of differences that are paired by seed.

The runs are short (300 steps, 1.2 million tokens). Neither the learning rate nor the coefficients were tuned.
"""


def claims(results: Results) -> list[Claim]:
    """Judge the claims of the paper."""
    times = f"at least {BALANCED_BY:g} times lower than without balancing"
    lower = partial(difference_below, results, limit=0.0)
    found = [
        lower_by_factor(results, f"MaxVio is {times} (sign, 0.005)", "", LOSS_FREE, NONE, MAX_VIO, BALANCED_BY),
        lower_by_factor(
            results,
            f"Under a softmax gate too, it is {times} (proportional, 0.05)",
            "",
            SOFTMAX,
            NONE_SOFTMAX,
            MAX_VIO,
            BALANCED_BY,
        ),
        equal_within(results, f"The loss is that without balancing within {MARGIN}", LOSS_FREE, NONE, LOSS, MARGIN),
    ]
    best = _lowest_loss(results, [arm for arm in MICRO + GLOBAL if results.get("", arm)])
    if best is not None:
        found += [
            lower(f"The loss is lower than with the auxiliary loss that costs least ({best})", LOSS_FREE, best, LOSS),
            lower(f"MaxVio is lower than with that auxiliary loss ({best})", LOSS_FREE, best, MAX_VIO),
        ]
    return [
        *found,
        lower(f"The loss is lower than with the strongest auxiliary loss ({MICRO[0]})", LOSS_FREE, MICRO[0], LOSS),
        lower(f"MaxVio is lower than with the strongest auxiliary loss ({MICRO[0]})", LOSS_FREE, MICRO[0], MAX_VIO),
        lower(
            "At 1e-2, an auxiliary loss of the global batch costs less than of a micro-batch", GLOBAL[0], MICRO[0], LOSS
        ),
        lower("Quantile balancing has a lower MaxVio than the sign rule at 0.005", "quantile", LOSS_FREE, MAX_VIO),
        _computation_claim(results),
    ]


def _lowest_loss(results: Results, arms: Sequence[str]) -> str | None:
    by_loss = {arm: results.values("", arm, "validation_loss") for arm in arms}
    return min((arm for arm in arms if by_loss[arm]), key=lambda arm: fmean(by_loss[arm]), default=None)


def _computation_claim(results: Results) -> Claim:
    """Judge how far above its floor the MaxVio of a computation batch is, in the smallest and the largest group.

    The floor itself falls with the size of the group, by chance alone, so the excess over it is compared.
    """
    text = "The excess of a computation batch's MaxVio over its floor falls with expert parallelism (sign, 0.005)"
    differences, sizes = [], (0, 0)
    for result in results.get("", LOSS_FREE):
        if rows := result.loads.get("computation"):
            first, last = rows[0], rows[-1]
            excess = [row["max_vio"] - row["max_vio_floor"] for row in (first, last)]
            differences.append(excess[1] - excess[0])
            sizes = (first["ranks"], last["ranks"])
    claim = judge(text, differences, MAX_VIO)
    return replace(claim, evidence=f"from {sizes[0]} to {sizes[1]} ranks {claim.evidence}") if differences else claim


def _computation(results: Results, arm: str, name: str = "max_vio") -> dict[int, list[float]]:
    """MaxVio of computation batches by expert-parallel size, one value per seed."""
    by_ranks: dict[int, list[float]] = {}
    for result in results.get("", arm):
        for row in result.loads.get("computation", ()):
            by_ranks.setdefault(row["ranks"], []).append(row[name])
    return by_ranks


def sections(results: Results, folder: Path) -> list[str]:
    """Write the figures, and the table of computation batches."""
    _draw_loss(folder / "loss.png", results)
    _draw_training(folder / "training.png", results)
    _draw_computation(folder / "computation.png", results)
    name = folder.name
    lines = [
        "### Loss against balance\n",
        f"![Loss against MaxVio of each run]({name}/loss.png)\n",
        "### MaxVio by batch over training\n",
        f"![MaxVio of each logged step, with its floor]({name}/training.png)\n",
        "### MaxVio of computation batches\n",
        *paragraphs(COMPUTATION),
        f"![MaxVio of computation batches against expert-parallel size]({name}/computation.png)\n",
    ]
    sizes = sorted({ranks for arm in results.arms for ranks in _computation(results, arm)})
    rows = []
    for arm in results.arms:
        values = _computation(results, arm)
        if values:
            rows.append([arm, *(format_mean(values.get(ranks, []), 3) for ranks in sizes)])
    floors = _computation(results, results.arms[0], "max_vio_floor")
    rows.append(["floor", *(format_mean(floors.get(ranks, []), 3) for ranks in sizes)])
    return [*lines, *markdown_table(["ranks", *map(str, sizes)], rows), ""]


def _draw_loss(path: Path, results: Results) -> None:
    figure, axes = _figure(8.0, 5.0)
    for label, (color, marker, arms) in FAMILIES.items():
        points = [
            (max_vio, loss)
            for arm in arms
            for result in results.get("", arm)
            if (max_vio := result.values.get(MAX_VIO.name)) is not None
            and (loss := result.values.get(LOSS.name)) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, color=color, marker=marker, s=36, alpha=0.8, label=label)
    floors = [result.values["max_vio_global_floor"] or 0.0 for result in results.all]
    axes.axvline(min(floors), color="gray", linestyle="--", linewidth=1, label="floor of MaxVio")
    axes.set_xscale("log")
    axes.set_xlabel("MaxVio_global on held-out text, mean over layers")
    axes.set_ylabel("loss on held-out text, nats per token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_training(path: Path, results: Results) -> None:
    figure, axes = _figure(8.0, 4.5)
    for arm, color in SHOWN.items():
        for number, result in enumerate(results.get("", arm)):
            label = arm if number == 0 else None
            axes.plot(*_curve(result, "max_vio"), color=color, linewidth=1.2, alpha=0.7, label=label)
    first = results.all[0]
    axes.plot(*_curve(first, "max_vio_floor"), color="gray", linestyle="--", label="floor")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("MaxVio of the global batch, mean over layers")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _curve(result: CellResult, name: str) -> tuple[list[float], list[float]]:
    points = zip(result.curves["step"], result.curves[name], strict=True)
    present = [(step, value) for step, value in points if step is not None and value is not None]
    return [step for step, _ in present], [value for _, value in present]


def _draw_computation(path: Path, results: Results) -> None:
    figure, axes = _figure(8.0, 4.5)
    for arm, color in SHOWN.items():
        if values := _computation(results, arm):
            means = [fmean(values[ranks]) for ranks in values]
            axes.plot(list(values), means, color=color, marker="o", label=arm)
    floors = _computation(results, results.arms[0], "max_vio_floor")
    axes.plot(list(floors), [fmean(values) for values in floors.values()], "--", color="gray", label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks of the expert-parallel group")
    axes.set_ylabel("MaxVio of a computation batch, mean over layers")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(True, linewidth=0.4, alpha=0.6)
    return figure, axes


STUDY = Study(
    name="loss_free",
    title="Loss-Free Balancing on mixed text",
    introduction=INTRODUCTION,
    columns=(
        Column("loss, nats per token", "validation_loss", 4),
        Column("MaxVio", "max_vio_global", 3),
        Column("worst layer", "max_vio_global_worst", 3),
        Column("floor", "max_vio_global_floor", 3),
        Column("deviation, %", "load_deviation_percent", 2),
        Column("floor, %", "load_deviation_percent_floor", 2),
        Column("MaxVio by batch", "train_max_vio", 3),
        Column("its floor", "train_max_vio_floor", 3),
    ),
    claims=claims,
    sections=sections,
    notes=NOTES,
    shares=("specialization",),
)
