"""The comparison of runs as tables for the terminal, and as plain values for JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dist_moe.observe.report.differing import COMMIT, Fact, config_differences, machine_facts, not_comparable
from dist_moe.observe.report.results import Row, number, result_rows
from dist_moe.observe.report.runs import RunData
from dist_moe.text import plain_text

MOST_FACTS = 40
MACHINE = frozenset({COMMIT, "seed", "workers", "expert parallel", "backend", "processor", "accelerators", "torch"})
WITHOUT_DIFFERENCE = frozenset({"step", "tokens"})
LONGEST_COMMIT = 12


def comparison(runs: Sequence[RunData]) -> Iterator[RenderableType]:
    """Yield the tables and lines that compare runs."""
    yield _results(runs)
    for reason in not_comparable(runs):
        yield Text(f"not comparable: {reason}", style="yellow")
    for run in runs:
        for problem in run.problems:
            yield Text(f"{run.name}: {problem}", style="yellow")
        if run.errors:
            message = f"{run.name}: {run.errors[0].exception}: {run.errors[0].message}"[:500]
            yield Text(plain_text(message), style="red")
    differing = config_differences(runs)
    if not differing:
        yield Text("Their configurations are equal.")
    else:
        yield _facts("Configuration", differing[:MOST_FACTS], runs)
        if len(differing) > MOST_FACTS:
            yield Text(f"and {len(differing) - MOST_FACTS} more fields; dist-moe report shows all")
    machine = [fact for fact in machine_facts(runs) if fact.name in MACHINE and fact.differs]
    if machine:
        yield _facts("Machine and versions", machine, runs)


def _results(runs: Sequence[RunData]) -> Table:
    """Build the table of the results; a floor has a row of its own below its measure."""
    table, two = _table("Results", runs), len(runs) == 2
    if two:
        table.add_column("difference", justify="right")
    table.add_row("state", *(Text(run.state.value) for run in runs))
    for row in result_rows(runs):
        digits = row.measure.digits
        values, floors = zip(
            *((number(value, digits), number(floor, digits)) for value, floor in row.results), strict=True
        )
        table.add_row(Text(row.measure.title), *map(Text, values), *([difference_text(row)] if two else []))
        if any(result.floor is not None for result in row.results):
            table.add_row("  floor", *map(Text, floors), style="dim")
    return table


def difference_text(row: Row) -> str:
    """Format what the second of two runs has more than the first."""
    one, other = (result.value for result in row.results)
    if one is None or other is None or row.measure.key in WITHOUT_DIFFERENCE:
        return ""
    text = f"{'+' if other >= one else '-'}{number(abs(other - one), row.measure.digits)}"
    return f"{text} ({(other - one) / abs(one):+.1%})" if one else text


def _facts(title: str, facts: Sequence[Fact], runs: Sequence[RunData]) -> Table:
    table = _table(title, runs)
    for fact in facts:
        values = map(_short_commit, fact.values) if fact.name == COMMIT else fact.values
        table.add_row(Text(fact.name), *map(Text, values))
    return table


def _short_commit(text: str) -> str:
    commit, blank, changes = text.partition(" ")
    return f"{commit[:LONGEST_COMMIT]}{blank}{changes}"


def _table(title: str, runs: Sequence[RunData]) -> Table:
    # Text, since a name of a folder or a value may look like markup.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for run in runs:
        table.add_column(Text(run.name), overflow="fold")
    return table


def comparison_values(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return the comparison as plain values: the runs, their results with floors by key, and what differs."""
    rows = result_rows(runs)
    return {
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "state": run.state.value,
                "results": {row.measure.key: row.results[index].value for row in rows},
                "floors": {
                    row.measure.key: row.results[index].floor for row in rows if row.results[index].floor is not None
                },
                "problems": list(run.problems),
            }
            for index, run in enumerate(runs)
        ],
        "not_comparable": not_comparable(runs),
        "config": {fact.name: list(fact.values) for fact in config_differences(runs)},
    }
