"""Tables of the studies: means with their spread, for the terminal and as Markdown."""

from collections.abc import Sequence
from statistics import fmean, stdev

from rich.box import SIMPLE_HEAD
from rich.table import Table


def format_mean(values: Sequence[float | None], digits: int = 0) -> str:
    """Format the mean and the standard deviation over seeds.

    Args:
        values: One value per seed; None where a seed has none.
        digits: After the decimal point.

    Returns:
        `4.2358 ±0.0030`, without the deviation if it rounds to 0; `95 ±3 (2 of 3)` if one of three values is None;
        `never` if all are.
    """
    present = [value for value in values if value is not None]
    if not present:
        return "never"
    text = f"{fmean(present):,.{digits}f}"
    deviation = f"{stdev(present):,.{digits}f}" if len(present) > 1 else "0"
    if deviation.strip("0.,"):
        text += f" ±{deviation}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Build the lines of a Markdown table, with the first column aligned to the left and the others to the right."""
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def terminal_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build a table for the terminal. In a narrow one cells break between words, never within a number."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column(headings[0], no_wrap=True)
    for heading, *column in list(zip(headings, *rows, strict=True))[1:]:
        longest = max(len(word) for cell in (heading, *column) for word in cell.split())
        table.add_column(heading, justify="right", min_width=longest)
    for row in rows:
        table.add_row(*row)
    return table
