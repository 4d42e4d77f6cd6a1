"""The table of the cases, and the verdict on all of them."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.parity.case import Case
from tests.parity.trace import Difference


@dataclass(frozen=True)
class Row:
    """One case: its difference from the reference, what is wrong with it, and the seconds that it took.

    what: what the run was for. twin: what it was compared with bit for bit, empty if with nothing.
    """

    case: Case
    what: str
    difference: Difference
    twin: str
    faults: list[str]
    seconds: float


def show(rows: list[Row], console: Console) -> bool:
    """Print every row and the sum of them -> whether there is no fault."""
    table = Table("started by", "workers", "EP", "ZeRO", "micro-batches", "optimizer", "routing", "purpose")
    for heading in ("loss", "norm", "assignments", "s"):
        table.add_column(heading, justify="right")
    table.add_column("bit for bit as")
    table.add_column("verdict")
    for row in rows:
        case, difference = row.case, row.difference
        layout = (case.workers, case.expert_parallel, case.zero_stage, case.micro_batches)
        table.add_row(
            case.start,
            *map(str, layout),
            case.optimizer,
            case.routing,
            row.what,
            f"{difference.loss:.1e}",
            f"{difference.norm:.1e}",
            f"{difference.share:.2%}",
            f"{row.seconds:.1f}",
            row.twin,
            "[red]FAILS[/]" if row.faults else "[green]holds[/]",
        )
    console.print(table)
    failed = [row for row in rows if row.faults]
    for row in failed:
        console.print(f"{row.case} ({row.what}): {'; '.join(row.faults)}", style="red", markup=False)
    console.print(f"{len(rows) - len(failed)} of {len(rows)} hold")
    return not failed
