"""Saving and loading beside DeepSpeed's own `save_checkpoint` of an MoE model of the same size, in one run.

`python -m tests.bench.saving`: two workers, the two programs by turns, the median of the rounds and their spread.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.bench import ours, theirs
from tests.dist.pool import RankPool
from tests.dist.resumable import write_text

ROWS = (
    ("parameters of a rank, M", "parameters", "parameters", 1e-6),
    ("checkpoint, MiB", "checkpoint_mib", "checkpoint_mib", 1),
    ("save, training waits, s", "save_s", "save_s", 1),
    ("  peak memory of a rank, MiB", "save_peak_mib", "save_peak_mib", 1),
    ("save beside training: stall, s", "stall_s", "save_s", 1),
    ("  stall of the first one, s", "first_stall_s", "save_s", 1),
    ("  all that training lost, s", "lost_s", "save_s", 1),
    ("  until the files are written, s", "write_s", None, 1),
    ("load, s", "load_s", "load_s", 1),
    ("  peak memory of a rank, MiB", "load_peak_mib", "load_peak_mib", 1),
)


def main(rounds: Annotated[int, typer.Option(min=1, help="Of both programs.")] = 5) -> None:
    """Measure, and print a table of the slowest rank's figures."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder, RankPool(2) as pool:
        text = write_text(Path(folder))
        for number in range(rounds):
            for name, program in (("ours", ours), ("theirs", theirs)):
                rank_info = Path(folder) / f"{name}-{number}"
                words = (text, rank_info) if program is ours else (rank_info,)
                ranks = pool.run(program.measure, 2, *words, timeout_s=300)
                found[name].append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    Console(width=110).print(table(found["ours"], found["theirs"]))


def table(mine: list[dict[str, float]], peers: list[dict[str, float]]) -> Table:
    """Median (least to most) of both, and the median of the ratios of the rounds."""
    drawn = Table("", "dist_moe", "DeepSpeed", "ratio", title=f"{len(mine)} rounds, two workers", title_justify="left")
    for title, own, other, unit in ROWS:
        values = [row[own] * unit for row in mine]
        if other is None:
            drawn.add_row(title, _spread(values), "", "")
            continue
        theirs_of = [row[other] * unit for row in peers]
        ratios = [one / two for one, two in zip(values, theirs_of, strict=True)]
        drawn.add_row(title, _spread(values), _spread(theirs_of), _spread(ratios))
    return drawn


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    typer.run(main)
