"""Tries thousands of damaged inputs on every surface and exits with 1 if one fails: `python -m tests.fuzz`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.fuzz.surface import Result, try_surface
from tests.fuzz.surfaces import all_surfaces


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Only surfaces whose name contains one of these.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Inputs of each surface.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed gives other inputs.")] = 0,
) -> None:
    """Feed damaged input to everything that reads input: no traceback, no hang, no growth."""
    console = Console(width=110)
    surfaces = [each for each in all_surfaces() if not names or any(name in each.name for name in names)]
    if not surfaces:
        console.print(f"no surface is named {', '.join(names or [])}: {', '.join(s.name for s in all_surfaces())}")
        raise typer.Exit(2)
    results = []
    for surface in surfaces:
        with tempfile.TemporaryDirectory(prefix="dist-moe-fuzz-") as folder:
            results.append(try_surface(surface, count, seed, Path(folder)))
        if results[-1].failure:
            console.print(f"{surface.name}: {results[-1].failure}", markup=False, highlight=False)
    console.print(table(results))
    if any(result.failure for result in results):
        raise typer.Exit(1)


def table(results: list[Result]) -> Table:
    """Return the outcome of each surface as a row."""
    shown = Table("surface", "inputs", "refused", "seconds", "growth, MiB", "outcome")
    for name, inputs, refused, seconds, growth, failure in results:
        cells = (f"{inputs:,}", f"{refused:,}", f"{seconds:.1f}", f"{growth / (1 << 20):.0f}")
        shown.add_row(name, *cells, "failed" if failure else "held")
    return shown


if __name__ == "__main__":
    typer.run(main)
