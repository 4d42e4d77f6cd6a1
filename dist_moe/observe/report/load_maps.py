"""Heat maps of the load over the steps, as small images with a palette: each color is one load.

Shapes: L MoE layers, E routed experts of a layer, C columns, each of one or more logged steps.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_moe.errors import reason_of
from dist_moe.observe.pictures.over_steps import MAX_COLUMNS, LoadOverSteps
from dist_moe.observe.pictures.scale import MAX_RATIO, colors, position, ratio_at
from dist_moe.observe.report.lines import read_loads
from dist_moe.observe.report.runs import RunData
from dist_moe.text import counted, plain_text

MOST_CELLS = 1_500_000
"""Of all maps of a page; a cell takes about a byte."""
FEWEST_COLUMNS = 32
NO_TOKENS, NO_VALUE, ABOVE, FIRST = 0, 1, 2, 3
LAST = 255
"""Indices of the palette: special cells, then the loads from 0 to MAX_RATIO by their position on the scale."""


def palette_ratios() -> NDArray[np.float64]:
    """Return load / target load of each color of the palette: 0 without tokens, NaN without a value, inf above."""
    scale = ratio_at(np.linspace(0.0, 1.0, LAST - FIRST + 1))
    scale[0] = scale[1] / 4  # above 0, which is the color of no tokens
    return np.concatenate([[0.0, np.nan, np.inf], scale])


def palette() -> NDArray[np.uint8]:
    """Return the 256 colors of the palette, [256, 3] uint8."""
    return colors(np.nan_to_num(palette_ratios(), nan=np.nan, posinf=2 * MAX_RATIO))


def indices(ratio: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Map load / target load to the palette, [...] float64 -> [...] uint8. NaN is no value."""
    places = np.clip(position(np.nan_to_num(ratio)), 0.0, 1.0)
    found = np.rint(places * (LAST - FIRST)).astype(np.int64) + FIRST
    found[ratio > MAX_RATIO] = ABOVE
    found[ratio == 0] = NO_TOKENS
    found[np.isnan(ratio)] = NO_VALUE
    return found.astype(np.uint8)


def png(cells: NDArray[np.uint8]) -> str:
    """Return an image of palette indices [H, W] as a data URL."""
    image = Image.fromarray(np.ascontiguousarray(cells), mode="P")
    image.putpalette(palette().reshape(-1).tolist())
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


@dataclass(frozen=True)
class LoadMap:
    """One heat map.

    Attributes:
        title: What is shown.
        run: The index of the run.
        row_name: What a row is: an expert or a layer.
        rows: How many rows there are.
        steps: The last step of each column.
        image: The image as a data URL, a pixel for each cell.
    """

    title: str
    run: int
    row_name: str
    rows: int
    steps: Sequence[int]
    image: str

    def titled(self, title: str) -> "LoadMap":
        """Return the same map with a title."""
        return replace(self, title=title)


@dataclass(frozen=True)
class RunLoads:
    """The load of one run over its steps.

    Attributes:
        run: The index of the run.
        columns: Its loads.
        columns_are_steps: Whether a column is one logged step.
        problem: Why some are missing; "" otherwise.
    """

    run: int
    columns: LoadOverSteps
    columns_are_steps: bool = True
    problem: str = ""

    def overview(self) -> LoadMap:
        """Draw the largest load / target load of each layer, which is MaxVio + 1."""
        return self._map("layer", self.columns.largest_LC())

    def of_layer(self, layer: int) -> LoadMap:
        """Draw the load of each expert of a layer."""
        return self._map("expert", self.columns.ratio_EC(layer))

    def _map(self, row_name: str, ratio_RC: NDArray[np.float64]) -> LoadMap:
        return LoadMap("", self.run, row_name, len(ratio_RC), self.columns.steps, png(indices(ratio_RC)))


def read_run_loads(runs: Sequence[RunData]) -> list[RunLoads]:
    """Read the loads of runs, with as many columns for each as fit a page; without those that have none."""
    rows = [_rows(run) for run in runs]
    columns = min(MAX_COLUMNS, max(FEWEST_COLUMNS, MOST_CELLS // max(1, sum(rows)) // 2 * 2))
    found = [_read(index, run, columns) for index, run in enumerate(runs)]
    return [loads for loads in found if len(loads.columns)]


def _rows(run: RunData) -> int:
    """Return the experts of all layers of a run."""
    path = run.folder / "metrics.jsonl"
    try:
        return next((sum(map(len, line.load)) for line in read_loads(path, run.metrics)), 0)
    except (OSError, ValueError):
        return 0


def _read(index: int, run: RunData, most_columns: int) -> RunLoads:
    columns, added, problem = LoadOverSteps(most_columns, run.target_shares), 0, ""
    try:
        for line in read_loads(run.folder / "metrics.jsonl", run.metrics):
            columns.add(line.step, line.load)
            added += 1
    except (OSError, ValueError) as error:
        problem = f"{run.name}: the load ends after {counted(added, 'logged step')} ({plain_text(reason_of(error))})."
    return RunLoads(index, columns, len(columns) == added, problem)


def layers_by_balance(loads: Sequence[RunLoads]) -> list[int]:
    """Return all layers, the least balanced of any run at the end of training first."""
    order: dict[int, float] = {}
    for of_run in loads:
        for rank, layer in enumerate(of_run.columns.least_balanced_layers(of_run.columns.layers)):
            order[layer] = min(order.get(layer, rank), rank)
    return sorted(order, key=lambda layer: (order[layer], layer))


def shown_layers(loads: Sequence[RunLoads]) -> list[int]:
    """Return the layers whose experts are drawn, in order: all, or the least balanced ones where all are too many."""
    shown, cells = list[int](), 0
    for layer in layers_by_balance(loads):
        cells += sum(
            len(of_run.columns.ratio_EC(layer)) * len(of_run.columns)
            for of_run in loads
            if layer < of_run.columns.layers
        )
        if cells > 2 * MOST_CELLS and shown:
            break
        shown.append(layer)
    return sorted(shown)
