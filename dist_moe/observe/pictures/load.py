"""The pictures of the load: layer by expert of one step, layer by step, and expert by step of single layers."""

from collections.abc import Sequence

import numpy as np

from dist_moe.observe.pictures.over_steps import LoadOverSteps, targets_of
from dist_moe.observe.pictures.panels import Axes, Panel, Picture, draw_panels
from dist_moe.policies.shares import TargetShares, equal_shares

MAX_CELL_PX, MIN_WIDE_CELL_PX = 18, 4
MAP_WIDTH_PX, MAX_MAP_WIDTH_PX = 768, 1600
LAYERS_HEIGHT_PX, EXPERTS_HEIGHT_PX = 600, 216
MOST_PANELS = 4
RATIO_NAME = "load of the expert / mean load of its layer"
RATIO_TO_TARGET_NAME = "load of the expert / its target by balance.shares"
LARGEST_NAME = "largest load / mean load of the layer = MaxVio + 1"
LARGEST_TO_TARGET_NAME = "largest load / target by balance.shares = MaxVio + 1"


def draw_load(
    load: Sequence[Sequence[int]],
    title: str = "Load of each expert in each MoE layer",
    target_shares: TargetShares = equal_shares,
) -> Picture:
    """Draw the load of every expert of every layer, in one step or one evaluation.

    Args:
        load: [L][E] assignments; layers may differ in E.
        title: Of the picture.
        target_shares: The target shares of the experts of a layer.

    Raises:
        ValueError: There is no layer or no expert to draw.
    """
    experts = max((len(row) for row in load), default=0)
    if experts == 0:
        raise ValueError(f"the load has {len(load)} layers and no expert; a heat map needs an MoE model")
    ratio_LE = np.full((len(load), experts), np.nan)
    for layer, row in enumerate(load):
        if sum(row):
            load_E = np.asarray(row, dtype=np.float64)
            ratio_LE[layer, : len(row)] = load_E / targets_of(load_E, target_shares(len(row)))
        else:
            ratio_LE[layer, : len(row)] = 0.0
    width = _cell_px(experts, MAX_MAP_WIDTH_PX, least=MIN_WIDE_CELL_PX)
    axes = Axes("MoE layer", "expert", range(experts), width, _cell_px(len(load), LAYERS_HEIGHT_PX, least=6))
    name = RATIO_NAME if target_shares(experts) is None else RATIO_TO_TARGET_NAME
    return draw_panels(title, [Panel("", ratio_LE)], axes, name)


def draw_layers_over_steps(history: LoadOverSteps) -> Picture:
    """Draw the largest load of every layer over the steps, one row for each layer.

    Raises:
        ValueError: The history has no step of an MoE model.
    """
    _require_columns(history)
    axes = _axes(history, "MoE layer", _cell_px(history.layers, LAYERS_HEIGHT_PX, least=6))
    title = "Most loaded expert of each MoE layer over the steps"
    name = LARGEST_TO_TARGET_NAME if history.has_targets else LARGEST_NAME
    return draw_panels(title, [Panel("", history.largest_LC())], axes, name)


def draw_experts_over_steps(history: LoadOverSteps, layers: Sequence[int] | None = None) -> Picture:
    """Draw the load of every expert over the steps, one heat map for each layer.

    Args:
        history: The load of the run.
        layers: Those to draw; None for all of at most 4, or the 4 that are least balanced now.

    Raises:
        ValueError: The history has no step of an MoE model.
    """
    _require_columns(history)
    if layers is None:
        few = history.layers <= MOST_PANELS
        layers = range(history.layers) if few else history.least_balanced_layers(MOST_PANELS)
    panels = []
    for layer in layers:
        ratio_EC = history.ratio_EC(layer)
        panels.append(Panel(f"MoE layer {layer}: MaxVio {ratio_EC[:, -1].max() - 1:.2f} at the end", ratio_EC))
    experts = max(len(panel.ratio_RC) for panel in panels)
    axes = _axes(history, "expert", _cell_px(experts, EXPERTS_HEIGHT_PX, least=1))
    which = "each" if len(panels) == history.layers else f"the {len(panels)} least balanced"
    plural = "s"[: which != "each"]
    name = RATIO_TO_TARGET_NAME if history.has_targets else RATIO_NAME
    return draw_panels(f"Load of each expert over the steps, in {which} MoE layer{plural}", panels, axes, name)


def _axes(history: LoadOverSteps, rows: str, cell_height: int) -> Axes:
    width = _cell_px(len(history), MAP_WIDTH_PX, least=1, largest=3 * MAX_CELL_PX)
    return Axes(rows, "step", history.steps, width, cell_height, grid=False)


def _cell_px(cells: int, room_px: int, least: int, largest: int = MAX_CELL_PX) -> int:
    return max(least, min(largest, room_px // cells))


def _require_columns(history: LoadOverSteps) -> None:
    if not len(history) or not history.layers:
        raise ValueError("the history has no step with a load; a picture over steps needs one of an MoE model")
