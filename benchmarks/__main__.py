"""The command of the benchmark: `python -m benchmarks`, as `make bench` and its variants call it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.block.measure import measure_block
from benchmarks.cases import CASES, QUICK, BlockCase, Case, StepCase, row_names
from benchmarks.environment import ROOT, describe
from benchmarks.ratchet import Change, compare, missing
from benchmarks.results import Measured, measured, read_results, results_path, write_results
from benchmarks.row import Row
from benchmarks.start import measure_start
from benchmarks.step.measure import measure_steps
from benchmarks.step.native_packages import native_version
from benchmarks.step.programs import PROGRAMS
from benchmarks.tables import table
from dist_moe.worker.cpu_features import multiplies_bf16

OUT = ROOT / "build" / "bench.json"
TURNS, QUICK_TURNS = (7, 2), (5, 2)
"""Rounds, and steps of a turn."""
MOST_LOAD = 1.0
"""The load average with which results are kept."""
NO_BF16 = "this CPU emulates bf16 (no avx512_bf16 or amx_bf16); name the case to measure it all the same"
REMEDY = "measure again where nothing else runs, or with more --steps, the committed results with --keep too"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Cases; without any, all of them.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The cases that matter most, in 5 minutes.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare with benchmarks/results/; exit 1 if slower.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the results into benchmarks/results/; idle machines only.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; in each, every program has a turn.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of a turn.")] = None,
    out: Annotated[Path, typer.Option(help="The file for the results.")] = OUT,
    show: Annotated[bool, typer.Option("--list", help="List cases and programs, and stop.")] = False,
) -> None:
    """Measure training steps and MoE blocks of this package and of its peers, in alternation."""
    console = Console(width=None if Console().is_terminal else 220)

    def log(line: str) -> None:
        console.print(line, style="dim", highlight=False, markup=False)

    if show:
        list_cases(console)
        return
    cases, environment, records = chosen(names, quick), describe(), list[Measured]()
    if keep:
        require_idle(environment["load"][0])
    console.print(" ".join(f"{key}={value}" for key, value in environment.items()), highlight=False, markup=False)
    default_rounds, default_steps = QUICK_TURNS if quick else TURNS
    began_s = time.monotonic()
    for case in cases:
        console.print(case.name, style="bold")
        environment = describe()
        skipped = not names and case.precision == "bf16" and not multiplies_bf16()
        rows = (
            [Row("all", NO_BF16)] if skipped else measure(case, rounds or default_rounds, steps or default_steps, log)
        )
        records.append(measured(case, environment | {"hf_native_transformers": native_version()}, rows))
        write_results(out, records)
        console.print(table(records[-1]))
    console.print(f"{(time.monotonic() - began_s) / 60:.1f} minutes; {out}")
    if check:
        check_results(records, results_path(environment), console)
    if keep:
        write_results(results_path(environment), [record for record in records if any(r.measured for r in record.rows)])


def require_idle(load: float) -> None:
    """Refuse to keep what a busy machine would measure.

    Args:
        load: The load average of the last minute.

    Raises:
        typer.BadParameter: It is above MOST_LOAD.
    """
    if load > MOST_LOAD:
        raise typer.BadParameter(
            f"the load average of the last minute is {load:.2f}, and --keep needs at most {MOST_LOAD:.1f}, because the "
            "ratios of a busy machine mislead; end what else runs and wait a minute, or leave out --keep"
        )


def chosen(names: list[str] | None, quick: bool) -> list[Case]:
    """Return the cases to measure.

    Raises:
        typer.BadParameter: A name is unknown, or not that of a quick case.
    """
    known = {case.name: case for case in QUICK} if quick else CASES
    for name in names or ():
        if name not in CASES:
            raise typer.BadParameter(f"unknown case {name}; --list prints the cases")
        if name not in known:
            raise typer.BadParameter(f"{name} is not a quick case; leave out --quick to measure it")
    return [known[name] for name in names or known]


def measure(case: Case, rounds: int, steps: int, log: Callable[[str], None]) -> list[Row]:
    """Measure one case; an error of the benchmark itself becomes the reason of each of its rows."""
    try:
        if isinstance(case, StepCase):
            return measure_steps(case, rounds, steps, log)
        return measure_block(case, rounds) if isinstance(case, BlockCase) else measure_start(case, rounds)
    except RuntimeError as error:
        return [Row(name, str(error)) for name in row_names(case)]


def check_results(records: list[Measured], path: Path, console: Console) -> None:
    """Compare with the committed results of this kind of machine.

    Raises:
        typer.Exit: With 1 where something became slower or larger, or was not measured; with 2 where there is nothing
            to compare with, or a ratio is too noisy to compare.
    """
    if not path.is_file():
        console.print(f"{path} does not exist; measure with --keep at the commit to compare with, and commit the file")
        raise typer.Exit(2)
    before = read_results(path)
    changes, lost = compare(before, records), missing(before, records)
    for change in changes:
        console.print(f"{verdict(change):7}{change}", highlight=False, markup=False)
    for line in lost:
        console.print(f"LOST   {line}", highlight=False, markup=False)
    if not changes and not lost:
        console.print(f"{path} has none of these cases")
        raise typer.Exit(2)
    if lost or any(change.slower or change.larger for change in changes):
        raise typer.Exit(1)
    if any(change.noisy for change in changes):
        console.print(REMEDY, highlight=False, markup=False)
        raise typer.Exit(2)


def verdict(change: Change) -> str:
    """Return the word for a change."""
    if change.slower:
        return "SLOWER"
    if change.larger:
        return "LARGER"
    return "NOISY" if change.noisy else "ok"


def list_cases(console: Console) -> None:
    """Print the names of the cases, and what the programs are."""
    for name, case in CASES.items():
        mark = " (quick)" if name in {quick.name for quick in QUICK} else ""
        console.print(f"{name}{mark}: {', '.join(row_names(case))}", highlight=False, markup=False)
    for name, program in PROGRAMS.items():
        console.print(f"{name}: {program.about}", highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(main)
