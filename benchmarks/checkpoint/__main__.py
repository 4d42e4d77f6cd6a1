"""Compares saving and loading with DeepSpeed's own `save_checkpoint` of an MoE model of the same size, in one run.

`python -m benchmarks.checkpoint`: two workers, the two programs in alternation, median and spread of the rounds.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint import ours, theirs
from tests.dist.pool import RankPool
from tests.dist.resumable import write_text

ROWS = (
    ("parameters of a rank, M", "parameters", "parameters", 1e-6),
    ("checkpoint, MiB", "checkpoint_mib", "checkpoint_mib", 1),
    ("synchronous save, s", "save_s", "save_s", 1),
    ("  peak memory of a rank, MiB", "save_peak_mib", "save_peak_mib", 1),
    ("asynchronous save: stall, s", "stall_s", "save_s", 1),
    ("  stall of the first save, s", "first_stall_s", "save_s", 1),
    ("  total time lost by training, s", "lost_s", "save_s", 1),
    ("  until the files are written, s", "write_s", None, 1),
    ("  peak memory of a rank, MiB", "async_peak_mib", None, 1),
    ("load, s", "load_s", "load_s", 1),
    ("  peak memory of a rank, MiB", "load_peak_mib", "load_peak_mib", 1),
)


def main(rounds: Annotated[int, typer.Option(min=1, help="Number of rounds of both programs.")] = 5) -> None:
    """Measure, and print a table of the slowest rank's figures."""
    results: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder, RankPool(2) as pool:
        text = write_text(Path(folder))
        for number in range(rounds):
            for name, program in (("ours", ours), ("theirs", theirs)):
                run = Path(folder) / f"{name}-{number}"
                arguments = (text, run) if program is ours else (run,)
                ranks = pool.run(program.measure, 2, *arguments, timeout_s=300)
                results[name].append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    Console(width=110).print(table(results["ours"], results["theirs"]))


def table(own: list[dict[str, float]], deepspeed: list[dict[str, float]]) -> Table:
    """Median (minimum to maximum) of both, and of the ratio in each round."""
    result = Table("", "dist_moe", "DeepSpeed", "ratio", title=f"{len(own)} rounds, two workers", title_justify="left")
    for title, own_key, deepspeed_key, unit in ROWS:
        values = [row[own_key] * unit for row in own]
        if deepspeed_key is None:
            result.add_row(title, _spread(values), "", "")
            continue
        deepspeed_values = [row[deepspeed_key] * unit for row in deepspeed]
        ratios = [first / second for first, second in zip(values, deepspeed_values, strict=True)]
        result.add_row(title, _spread(values), _spread(deepspeed_values), _spread(ratios))
    return result


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    typer.run(main)
