"""A figure of the load of finished or running runs, from their metrics.jsonl: MaxVio, and the load of each expert.

Shapes: S logged steps, E experts of one layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from dist_moe.errors import UserError, needs_folder, reason_of
from dist_moe.observe.pictures.over_steps import targets_of
from dist_moe.observe.pictures.scale import ABOVE_RGB, NO_TOKENS_RGB, TICKS, position, scale_colors
from dist_moe.policies.shares import shares_in_file
from dist_moe.text import listed
from dist_moe.untrusted import parse_json, read_json, read_text

Theme = Literal["light", "dark"]
# Background, text and grid of a page on GitHub, so that the image blends in.
THEMES: dict[Theme, tuple[str, str, str]] = {
    "light": ("#ffffff", "#1f2328", "#d1d9e0"),
    "dark": ("#0d1117", "#f0f6fc", "#3d444d"),
}
# Okabe and Ito's colors, which are distinct to color-blind readers and on both backgrounds.
LINE_COLORS = ("#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#E69F00")
WIDTH_INCHES, DPI = 9.0, 200
LARGEST_METRICS = 1 << 30


class LoggedStep(BaseModel):
    """What is read of the record of a step in metrics.jsonl."""

    step: PositiveInt
    skipped: bool
    max_vio: FiniteFloat
    max_vio_floor: FiniteFloat
    max_vio_per_layer: list[FiniteFloat]
    load: list[Annotated[list[NonNegativeInt], Field(min_length=1)]]

    @model_validator(mode="after")
    def _has_equal_layers(self) -> "LoggedStep":
        if len(self.load) != len(self.max_vio_per_layer):
            raise ValueError(f"{len(self.load)} layers of load, {len(self.max_vio_per_layer)} of MaxVio")
        return self


@dataclass(frozen=True)
class LoadHistory:
    """The load of one run over its logged steps.

    Attributes:
        label: Balancing policy, with the folder where two runs have the same policy.
        steps: S logged steps, in order.
        max_vio: Mean over layers, of each step.
        floor: Expected MaxVio under uniform random routing, of each step.
        max_vio_per_layer: [S][L].
        load: [S][L][E] assignments.
        given_shares: `balance.shares` of the run, as its file has it.
    """

    label: str
    steps: list[int]
    max_vio: list[float]
    floor: list[float]
    max_vio_per_layer: list[list[float]]
    load: list[list[list[int]]]
    given_shares: Any = None


def read_histories(folders: Sequence[Path]) -> list[LoadHistory]:
    """Read the load of runs.

    Args:
        folders: run.dir of each run.

    Raises:
        UserError: A folder has no logged step of an MoE model, or the runs differ in their layers or experts.
    """
    balances = [_balance(folder) for folder in folders]
    policies = [str(balance.get("policy", folder.name)) for balance, folder in zip(balances, folders, strict=True)]
    labels = [
        f"{policy} ({folder.name})" if Counter(policies)[policy] > 1 else policy
        for policy, folder in zip(policies, folders, strict=True)
    ]
    histories = [
        _read_history(folder, label, balance.get("shares"))
        for folder, label, balance in zip(folders, labels, balances, strict=True)
    ]
    shapes = {tuple(map(len, history.load[0])) for history in histories}
    if len(shapes) > 1:
        counts = listed(sorted(f"{len(shape)} MoE layers of {listed(set(shape))} experts" for shape in shapes), "and")
        raise UserError(f"the runs have {counts}; compare runs of one model")
    return histories


def _balance(folder: Path) -> dict[str, Any]:
    """Return the section `balance` of a run; empty where it cannot be read."""
    try:
        balance = read_json(folder / "run.json", follow=True)["config"]["balance"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return balance if isinstance(balance, dict) else {}


def _read_history(folder: Path, label: str, given_shares: Any) -> LoadHistory:
    path = folder / "metrics.jsonl"
    try:
        # A run in progress may have written a part of its last line.
        lines = read_text(path, follow=True, largest=LARGEST_METRICS).split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); name the run.dir of a run") from None
    # A resumed run may have logged a step twice; the last record is valid.
    steps: dict[int, LoggedStep] = {}
    for number, line in enumerate(lines, start=1):
        if (record := _parse_step(line, f"{path}, line {number}")) and record.load and not record.skipped:
            steps[record.step] = record
    if not steps:
        raise UserError(f"{path} has no logged step with a load; name a run of an MoE model that has logged a step")
    ordered = [steps[step] for step in sorted(steps)]
    if len({tuple(map(len, record.load)) for record in ordered}) > 1:
        raise UserError(f"{path} has steps of models with different layers or experts; name the run.dir of one run")
    return LoadHistory(
        label=label,
        steps=[record.step for record in ordered],
        max_vio=[record.max_vio for record in ordered],
        floor=[record.max_vio_floor for record in ordered],
        max_vio_per_layer=[record.max_vio_per_layer for record in ordered],
        load=[record.load for record in ordered],
        given_shares=given_shares,
    )


def _parse_step(line: str, where: str) -> LoggedStep | None:
    """Return the record of a step; None for one of another event."""
    try:
        record = parse_json(line)
        return LoggedStep.model_validate(record, strict=True) if record.get("event") == "step" else None
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        key = ".".join(map(str, found["loc"])) or "step"
        raise UserError(f"{where} is not the record of a step ({key}: {found['msg']}); name another run.dir") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); name another run.dir") from None


def least_balanced_layer(histories: Sequence[LoadHistory]) -> int:
    """Return the layer with the largest MaxVio, averaged over all steps and runs."""
    by_step = [values for history in histories for values in history.max_vio_per_layer]
    return max(range(len(by_step[0])), key=lambda layer: fmean(values[layer] for values in by_step))


def draw_load_figure(
    path: Path, histories: Sequence[LoadHistory], layer: int | None = None, theme: Theme = "light"
) -> None:
    """Write a PNG: MaxVio over steps with its sampling floor, and a heat map of one layer's experts for each run.

    Args:
        path: Of the image; its folder is created.
        histories: Runs of one model.
        layer: MoE layer of the heat maps, counted from 0; None for the least balanced one.
        theme: Colors for a light or a dark page.

    Raises:
        UserError: There is no such layer, or the file cannot be written.
    """
    layers = len(histories[0].load[0])
    if layer is not None and not 0 <= layer < layers:
        raise UserError(f"layer={layer}; the model has {layers} MoE layers, counted from 0")
    layer = least_balanced_layer(histories) if layer is None else layer
    background, text, grid = THEMES[theme]
    figure = Figure(figsize=(WIDTH_INCHES, 2.5 + 1.5 * len(histories)), layout="constrained", facecolor=background)
    FigureCanvasAgg(figure)
    curves, *maps = figure.subplots(1 + len(histories), 1, sharex=True, height_ratios=[2.0, *[1.2] * len(histories)])
    for axes in (curves, *maps):
        axes.set_facecolor(background)
        axes.tick_params(colors=text, labelsize=10)
        for spine in axes.spines.values():
            spine.set_color(grid)
        axes.xaxis.label.set_color(text)
        axes.yaxis.label.set_color(text)
    curves.set_title("MaxVio = largest load / mean load - 1, mean over layers", fontsize=11, loc="left", color=text)
    _draw_curves(curves, histories, text, grid)
    color_map = load_color_map()
    for axes, history in zip(maps, histories, strict=True):
        title = f"{history.label}: load of each expert of MoE layer {layer}"
        axes.set_title(title, fontsize=11, loc="left", color=text)
        _draw_experts(axes, history, layer, color_map)
    maps[-1].set_xlabel("step", fontsize=11)
    bar = figure.colorbar(maps[0].collections[0], ax=maps, extend="max", ticks=position(np.array(TICKS)), pad=0.01)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in TICKS])
    # One line is longer than one heat map is high.
    between = "\n" if len(maps) == 1 else " "
    reference = "mean or target" if any(history.given_shares is not None for history in histories) else "mean"
    bar.set_label(f"load / {reference}{between}(black: no tokens)", color=text, fontsize=10)
    bar.ax.tick_params(colors=text, labelsize=10)
    bar.outline.set_edgecolor(grid)
    with needs_folder(path, "--out", "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, facecolor=background, format="png")


def load_color_map() -> Colormap:
    """Return the colors of `position(load / mean load)` from 0 to 1, with those of no tokens and of loads above."""
    stops = scale_colors(np.linspace(0.0, 1.0, 256)) / 255.0
    over, bad = (f"#{bytes(color).hex()}" for color in (ABOVE_RGB, NO_TOKENS_RGB))
    return LinearSegmentedColormap.from_list("load", stops).with_extremes(over=over, bad=bad)


def _draw_curves(axes: Axes, histories: Sequence[LoadHistory], text: str, grid: str) -> None:
    for index, history in enumerate(histories):
        color = LINE_COLORS[index % len(LINE_COLORS)]
        axes.plot(history.steps, history.max_vio, color=color, linewidth=2, label=f"balance.policy: {history.label}")
    longest = max(histories, key=lambda history: history.steps[-1])
    axes.plot(longest.steps, longest.floor, color=text, linestyle="--", linewidth=1.2, label="sampling floor")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, color=grid, linewidth=0.5)
    axes.set_ylabel("MaxVio", fontsize=11)
    axes.legend(fontsize=10, frameon=False, labelcolor=text, loc="center right")


def _draw_experts(axes: Axes, history: LoadHistory, layer: int, color_map: Colormap) -> None:
    load_SE = np.array([of_step[layer] for of_step in history.load], dtype=np.float64)
    ratio_SE = load_SE / targets_of(load_SE, shares_in_file(history.given_shares, load_SE.shape[1]))
    # A column reaches from the step halfway to the previous logged one up to that halfway to the next.
    steps = np.array(history.steps, dtype=np.float64)
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])
    experts = np.arange(load_SE.shape[1] + 1) - 0.5
    places_SE = np.ma.masked_where(load_SE == 0, position(ratio_SE))
    axes.pcolormesh(edges, experts, places_SE.T, cmap=color_map, vmin=0, vmax=1)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel("expert", fontsize=11)
