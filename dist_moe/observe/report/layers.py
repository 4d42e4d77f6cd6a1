"""The table of the load of each layer over the held-out text, as the run prints it at its end."""

from collections.abc import Sequence
from typing import NamedTuple

from dist_moe.observe.report.lines import ValidationLine
from dist_moe.observe.report.results import number
from dist_moe.observe.report.runs import RunData

HEADINGS = ("layer", "MaxVio_global", "floor", "deviation, %", "least / mean", "most / mean", "experts per token")


class LayerTable(NamedTuple):
    """A table with its title."""

    title: str
    headings: Sequence[str]
    rows: list[list[str]]


def layer_table(run: RunData, alone: bool) -> LayerTable | None:
    """Return the load of each layer in the last evaluation of a run; None where it has none."""
    line = run.metrics.validations[-1] if run.metrics.validations else None
    if line is None or not line.load:
        return None
    rows = [_row(line, layer, load) for layer, load in enumerate(line.load)]
    title = f"{'' if alone else f'{run.name}, '}after step {line.step:,}"
    return LayerTable(title, HEADINGS, rows)


def _row(line: ValidationLine, layer: int, load: Sequence[int]) -> list[str]:
    mean = sum(load) / len(load)
    extremes = [f"{count / mean:.2f} (expert {load.index(count)})" if mean else "-" for count in (min(load), max(load))]
    columns = (
        (line.max_vio_global_per_layer, 3),
        (line.max_vio_global_floor_per_layer, 3),
        (line.load_deviation_percent_per_layer, 2),
        (line.experts_per_token_per_layer, 2),
    )
    *before, last = (number(values[layer] if layer < len(values) else None, digits) for values, digits in columns)
    return [str(layer), *before, *extremes, last]
