"""The table of the load of each layer over the held-out text, as the run prints it at its end."""

from collections.abc import Sequence
from typing import NamedTuple

from dist_moe.observe.report.lines import ValidationLine
from dist_moe.observe.report.results import number
from dist_moe.observe.report.runs import RunData
from dist_moe.policies.shares import Shares, extreme_loads


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
    shares = [run.target_shares(len(load)) for load in line.load]
    rows = [_row(line, layer, load, shares[layer]) for layer, load in enumerate(line.load)]
    extremes = [f"{which} / {'target' if any(shares) else 'mean'}" for which in ("least", "most")]
    headings = ("layer", "MaxVio_global", "floor", "deviation, %", *extremes, "experts per token")
    title = f"{'' if alone else f'{run.name}, '}after step {line.step:,}"
    return LayerTable(title, headings, rows)


def _row(line: ValidationLine, layer: int, load: Sequence[int], shares: Shares) -> list[str]:
    extremes = [f"{ratio:.2f} (expert {expert})" if sum(load) else "-" for expert, ratio in extreme_loads(load, shares)]
    columns = (
        (line.max_vio_global_per_layer, 3),
        (line.max_vio_global_floor_per_layer, 3),
        (line.load_deviation_percent_per_layer, 2),
        (line.experts_per_token_per_layer, 2),
    )
    *before, last = (number(values[layer] if layer < len(values) else None, digits) for values, digits in columns)
    return [str(layer), *before, *extremes, last]
