"""Trains on every layout and with every launcher, and exits with 1 if any differs: `python -m tests.parity`.

What is crossed:

- Every valid combination of 1, 2 and 4 workers, expert parallel 1, 2 and 4, ZeRO stage 0, 1 and 2, with and without
  accumulation, SGD and AdamW (72 cases) trains 20 steps twice in a pool of warm processes, through
  `dist_moe.train.loop.run`. Losses and gradient norms are those of one worker to 1e-4 (relative), loads are equal
  in step 1 and then differ in at most 0.1 % of the assignments, and both runs are equal bit for bit.
- The other routings (threshold routing; the same with adaptive weights and a budget; quantile, EMA quantile, momentum
  and expert thresholds; the auxiliary loss over the global batch), an upcycled decoder, and an upcycled encoder that
  classifies, train on layouts in which every pair of values occurs, and are held to the same.
- The launchers deepspeed, torchrun and mpirun (with the MPI backend) start `dist-moe launch` on cases in which every
  combination of any THREE of launcher, workers, expert parallel, stage, accumulation and optimizer occurs. Each is held
  to the same, and is equal bit for bit to the same case in the pool, or over MPI to a second run of itself.
  `--launched all` takes all 216 (an hour and a half on two cores).
- Controls: expert gradients times the expert-parallel degree must break both the losses' and the norms' rule.
- Activation checkpointing, on against off, in one case of each optimizer: equal bit for bit.
"""

import sys
import time
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from tests.dist.pool import RankPool
from tests.parity.case import LAUNCHERS, OPTIMIZERS, POOL, Case, covering, every_case, other_routings
from tests.parity.check import check_checkpointing, check_controls, check_launched, check_pool
from tests.parity.reference import References
from tests.parity.report import Row, show
from tests.parity.setting import closest_allowed
from tests.parity.trace import Trace


class Extent(StrEnum):
    """How many of the cases to train."""

    all = "all"
    triples = "triples"
    pairs = "pairs"
    none = "none"


def main(
    layouts: Annotated[Extent, typer.Option(help="Cases in the pool; triples: covering them.")] = Extent.all,
    launched: Annotated[Extent, typer.Option(help="Cases with real launchers, likewise.")] = Extent.triples,
) -> None:
    """Train one config on every layout and with every launcher, and compare."""
    # A file or a pipe has no width; the table needs about 150 columns.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    pooled, real = choose(every_case(POOL), layouts), choose(every_case(*LAUNCHERS), launched)
    others = [] if layouts is Extent.none else other_routings(covering(every_case(POOL), 2))
    console.print(
        f"{len(pooled) + len(others)} cases twice in the pool ({layouts}), {len(real)} with launchers ({launched})"
    )
    rows: list[Row] = []
    started_s = time.monotonic()

    def tell(row: Row) -> None:
        rows.append(row)
        verdict = "; ".join(row.faults) or "holds"
        console.print(f"{len(rows):4} {row.case} {row.what}: {verdict}", highlight=False, markup=False)

    with RankPool(size=4) as pool:
        references = References(pool)
        traces: dict[Case, Trace] = {}
        check_pool(pool, pooled, references, traces, tell)
        check_pool(pool, others, references, traces, tell)
        controls = [Case(POOL, 4, degree, 1, 3, optimizer) for degree in (2, 4) for optimizer in OPTIMIZERS]
        check_controls(pool, controls, references, tell)
        recomputed = [Case(POOL, 2, 2, 1, 3, optimizer) for optimizer in OPTIMIZERS]
        check_checkpointing(pool, recomputed, references, traces, tell)
        check_launched(pool, real, references, traces, tell)
    for case, found in references.known.items():
        least = closest_allowed(case.routing)
        console.print(f"{case}: seed {found.seed}, closest decision {found.closest:.1e} (>= {least:.0e})")
    held = show(rows, console)
    console.print(f"{(time.monotonic() - started_s) / 60:.0f} minutes")
    raise typer.Exit(0 if held else 1)


def choose(cases: list[Case], extent: Extent) -> list[Case]:
    """The cases of that extent."""
    if extent is Extent.all:
        return cases
    return [] if extent is Extent.none else covering(cases, 3 if extent is Extent.triples else 2)


if __name__ == "__main__":
    typer.run(main)
