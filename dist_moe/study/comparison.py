"""The files of the study of policies: results.json, table.md and policies.png."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from dist_moe.files import write_atomically
from dist_moe.observe.record import host, source_state, versions
from dist_moe.study import tables
from dist_moe.study.policies import HEADINGS, VARIANTS, Result, Run, ratio_by_seed, table_rows


def write_comparison(out: Path, runs: Sequence[Run], results: Sequence[Result]) -> None:
    """Write all files, replacing those of a previous study."""
    made = {"versions": versions(), "source": source_state(Path(__file__)), "host": host()}
    plain = {
        "made": made,
        "variants": [asdict(variant) for variant in VARIANTS],
        "commands": [list(run.argv[3:]) for run in runs],
        "results": [asdict(result) for result in results],
    }
    write_atomically(out / "results.json", json.dumps(plain, indent=1) + "\n")
    write_atomically(out / "table.md", markdown(results))
    draw(out / "policies.png", results)


def markdown(results: Sequence[Result]) -> str:
    """Build the table as Markdown, followed by the effect of adaptive weights on threshold routing."""
    return "\n".join([*tables.markdown_table(HEADINGS, table_rows(results)), "", *findings(results), ""])


def terminal_table(results: Sequence[Result]) -> Table:
    """Build the table for the terminal."""
    title = "Held-out text: mean over seeds ± standard deviation"
    return tables.terminal_table(title, HEADINGS, table_rows(results))


def findings(results: Sequence[Result]) -> list[str]:
    """State by which factor adaptive weights lower the load deviation of threshold routing."""
    lines = []
    for field, scope in (("deviation_percent", "mean over layers"), ("deviation_percent_worst", "worst layer")):
        mean, smallest = ratio_by_seed(results, field, "threshold", "threshold + adaptive weights")
        lines.append(
            f"Adaptive weights lower the load deviation of threshold routing by a factor of {mean:.1f} ({scope}; at "
            f"least {smallest:.1f} for each seed)."
        )
    return lines


def draw(path: Path, results: Sequence[Result]) -> None:
    """Write a PNG with loss and imbalance of every run, one row per policy."""
    names = list(dict.fromkeys(result.variant for result in results))
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    loss, balance, deviation = figure.subplots(1, 3, sharey=True)
    _dots(loss, names, results, "validation_loss", "#0072B2", "validation loss, nats per token")
    _dots(balance, names, results, "max_vio_worst", "#E69F00", "")
    _dots(balance, names, results, "max_vio", "#0072B2", "MaxVio_global (orange: worst layer)")
    _dots(deviation, names, results, "deviation_percent_worst", "#E69F00", "")
    _dots(deviation, names, results, "deviation_percent", "#0072B2", "load deviation, % (orange: worst layer)")
    for axes, floor in ((balance, "max_vio_floor"), (deviation, "deviation_percent_floor")):
        axes.set_xscale("log")
        axes.axvline(min(getattr(result, floor) for result in results), color="black", linestyle="--", linewidth=1)
    loss.set_yticks(range(len(names)), names)
    loss.invert_yaxis()
    figure.savefig(path, dpi=110)


def _dots(axes: Axes, names: list[str], results: Sequence[Result], field: str, color: str, label: str) -> None:
    axes.scatter(
        [getattr(result, field) for result in results],
        [names.index(result.variant) for result in results],
        color=color,
        s=22,
        alpha=0.8,
    )
    axes.grid(True, linewidth=0.4, alpha=0.6)
    if label:
        axes.set_xlabel(label, fontsize=9)
