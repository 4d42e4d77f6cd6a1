"""Tries every mutant on a copy of the tree and exits with 1 if one survives: `python -m tests.mutants`."""

import contextlib
import queue
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.mutants.catalogue import CatalogueError, Mutant, read_catalogue
from tests.mutants.trial import PASSED, Verdict, copy_tree, run_tests, try_mutant

ROOT = Path(__file__).resolve().parents[2]
IDENTITY_TEST = "tests/unit/test_architecture.py::test_the_tree_under_test_is_this_one"
"""Runs with the unchanged tests: in a copy that imported the installed package every mutant would survive."""


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only mutants whose name or trap contains one of these.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Mutants tried at the same time, each on its own copy.")] = 2,
    limit_s: Annotated[float, typer.Option(min=1, help="Seconds after which a test is ended.")] = 300,
    root: Annotated[Path, typer.Option(help="The tree, a git checkout.")] = ROOT,
) -> None:
    """Break the code one line at a time; each time the test named beside the change must fail."""
    console = Console()
    try:
        mutants = [mutant for mutant in read_catalogue(root) if _chosen(mutant, names or [])]
    except CatalogueError as error:
        console.print(str(error), markup=False, style="red")
        raise typer.Exit(1) from None
    if names and not mutants:
        console.print(f"no mutant's name or trap contains {' or '.join(names)}; see tests/mutants/mutants.toml")
        raise typer.Exit(1)
    with contextlib.ExitStack() as stack:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for _ in range(min(jobs, len(mutants))):
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dist-moe-mutants-"))).resolve()
            copy_tree(root, copy)
            copies.put(copy)
        if mutants:
            _check_unchanged(copies, mutants, root, limit_s, console)
        verdicts = _try_all(copies, mutants, jobs, limit_s, console)
    _show(verdicts, console)
    if not all(verdict.caught for verdict in verdicts):
        raise typer.Exit(1)


def _chosen(mutant: Mutant, names: list[str]) -> bool:
    return not names or any(name in mutant.name or name == mutant.trap for name in names)


def _check_unchanged(
    copies: queue.SimpleQueue[Path], mutants: list[Mutant], root: Path, limit_s: float, console: Console
) -> None:
    """Without a change every named test must pass, or its failure would say nothing."""
    tests = sorted({mutant.test for mutant in mutants})
    if (root / IDENTITY_TEST.partition("::")[0]).is_file():
        tests.insert(0, IDENTITY_TEST)
    copy = copies.get()
    run = run_tests(copy, tests, limit_s * len(tests))
    copies.put(copy)
    if run.code != PASSED:
        console.print(run.output, markup=False, highlight=False)
        console.print("the tests named by the mutants must pass on the unchanged code", style="red")
        raise typer.Exit(1)
    console.print(f"{len(tests)} tests pass on the unchanged code ({run.seconds:.0f} s)")


def _try_all(
    copies: queue.SimpleQueue[Path], mutants: list[Mutant], jobs: int, limit_s: float, console: Console
) -> list[Verdict]:
    def attempt(mutant: Mutant) -> Verdict:
        copy = copies.get()
        try:
            return try_mutant(copy, mutant, limit_s)
        finally:
            copies.put(copy)

    verdicts = []
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(attempt, mutants):
            verdicts.append(verdict)
            if not verdict.caught:
                console.print(f"{verdict.mutant.name}: {verdict.outcome}", style="red", markup=False)
                console.print(verdict.output, markup=False, highlight=False)
    return verdicts


def _show(verdicts: list[Verdict], console: Console) -> None:
    table = Table("trap", "mutant", "test", "outcome", "s")
    for verdict in verdicts:
        colour = "green" if verdict.caught else "red"
        mutant = verdict.mutant
        table.add_row(
            mutant.trap,
            escape(mutant.name),
            escape(mutant.test.rpartition("::")[2]),
            f"[{colour}]{escape(verdict.outcome)}[/]",
            f"{verdict.seconds:.1f}",
        )
    console.print(table)
    caught = sum(verdict.caught for verdict in verdicts)
    console.print(f"{caught} of {len(verdicts)} mutants caught")


if __name__ == "__main__":
    typer.run(main)
