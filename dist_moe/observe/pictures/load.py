"""The pictures of the load: layer by expert of one step, layer by step, and expert by step of one layer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dist_moe.observe.pictures.heat_map import Axes, Picture, draw_heat_map
from dist_moe.observe.pictures.over_steps import LoadOverSteps, targets_of
from dist_moe.policies.shares import TargetShares, equal_shares

MAP_WIDTH_PX, MAP_HEIGHT_PX = 280, 128
MAX_CELL_HEIGHT_PX, MAX_CELL_WIDTH_PX = 20, 36
MOST_LAYERS = 4
"""Layers whose experts are drawn over the steps."""
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
    axes = Axes("MoE layer", "expert", range(experts), _cell_width(experts), _cell_height(len(load)))
    name = RATIO_NAME if target_shares(experts) is None else RATIO_TO_TARGET_NAME
    return draw_heat_map(title, ratio_LE, axes, name)


def draw_layers_over_steps(history: LoadOverSteps) -> Picture:
    """Draw the largest load of every layer over the steps, one row for each layer.

    Raises:
        ValueError: The history has no step of an MoE model.
    """
    _require_columns(history)
    title = "Most loaded expert of each MoE layer over the steps"
    name = LARGEST_TO_TARGET_NAME if history.has_targets else LARGEST_NAME
    return _over_steps(history, title, history.largest_LC(), "MoE layer", name)


def shown_layers(history: LoadOverSteps) -> list[int]:
    """Return the layers whose experts are drawn: all of at most 4, else the 4 least balanced ones, worst first."""
    if history.layers <= MOST_LAYERS:
        return list(range(history.layers))
    return history.least_balanced_layers(MOST_LAYERS)


def draw_experts_over_steps(history: LoadOverSteps, layer: int) -> Picture:
    """Draw the load of every expert of a layer over the steps.

    Args:
        history: The load of the run.
        layer: Of the model's MoE layers, from 0.

    Raises:
        ValueError: The history has no step of an MoE model.
    """
    _require_columns(history)
    ratio_EC = history.ratio_EC(layer)
    title = f"Experts of MoE layer {layer} over the steps; MaxVio now {ratio_EC[:, -1].max() - 1:.2f}"
    name = RATIO_TO_TARGET_NAME if history.has_targets else RATIO_NAME
    return _over_steps(history, title, ratio_EC, "expert", name)


def _over_steps(
    history: LoadOverSteps, title: str, ratio_RC: NDArray[np.float64], rows: str, scale_name: str
) -> Picture:
    axes = Axes(rows, "step", history.steps, _cell_width(len(history)), _cell_height(len(ratio_RC)), grid=False)
    return draw_heat_map(title, ratio_RC, axes, scale_name)


def _cell_width(columns: int) -> int:
    return max(1, min(MAX_CELL_WIDTH_PX, MAP_WIDTH_PX // columns))


def _cell_height(rows: int) -> int:
    return max(1, min(MAX_CELL_HEIGHT_PX, MAP_HEIGHT_PX // rows))


def _require_columns(history: LoadOverSteps) -> None:
    if not len(history) or not history.layers:
        raise ValueError("the history has no step with a load; a picture over steps needs one of an MoE model")
