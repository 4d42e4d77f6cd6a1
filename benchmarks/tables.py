"""Measured cases as tables for a terminal."""

from rich.table import Table

from benchmarks.results import Measured, Ratio, ratios, tokens_per_s
from benchmarks.row import Row
from benchmarks.statistics import Spread, spread

REASON_LENGTH = 100


def table(record: Measured) -> Table:
    """Return the table of a case: one row for each program, with medians and quartiles."""
    found = ratios(record)
    own = list(dict.fromkeys(ratio.program for ratio in found))
    result = Table(title=f"{record.case} ({record.kind}, {record.tokens:,} tokens)", title_justify="left")
    result.add_column("program")
    step = record.kind == "step"
    columns = ["tokens/s", "ms", *(f"{name}: times as fast" for name in own)]
    columns += ["memory, MiB", "loss", "MaxVio (floor)", "experts/token", "start, s", "exchange, MB"] if step else []
    for column in columns:
        result.add_column(column, justify="right")
    for row in record.rows:
        result.add_row(row.name, *(cells(record, row, found, own) if row.measured else [shortened(row.reason)]))
    return result


def cells(record: Measured, row: Row, found: list[Ratio], own: list[str]) -> list[str]:
    """Return the cells of a row that was measured."""
    speeds = {(ratio.program, ratio.other): ratio.speed for ratio in found}
    factors = [shown(speeds[name, row.name], 2) if (name, row.name) in speeds else "" for name in own]
    rate = shown(tokens_per_s(record, row), 0) if record.tokens else ""
    texts = [rate, shown(spread([1e3 * value for value in row.seconds]), 1), *factors]
    if record.kind != "step":
        return texts
    vio = "" if row.max_vio is None else f"{row.max_vio:.2f} ({number(row.max_vio_floor, 2)})"
    numbers = (number(row.peak_mib, 0), number(row.loss, 3), vio, number(row.experts_per_token, 2))
    return [*texts, *numbers, number(row.start_s, 1), exchanged(row)]


def exchanged(row: Row) -> str:
    """Return the MB that rank 0 gave to all-to-all in a step, and to the other collectives."""
    if not row.bytes:
        return "not counted"
    to_all = row.bytes.get("all_to_all_single", 0)
    return f"{to_all / 1e6:.1f} + {(sum(row.bytes.values()) - to_all) / 1e6:.1f}"


def shown(value: Spread, digits: int) -> str:
    """Return a median with its quartiles."""
    return f"{value.median:,.{digits}f} ({value.low:,.{digits}f} to {value.high:,.{digits}f})"


def number(value: float | None, digits: int) -> str:
    """Return a number, or nothing."""
    return "" if value is None else f"{value:,.{digits}f}"


def shortened(reason: str) -> str:
    """Return the last line of a reason that says something, within REASON_LENGTH characters."""
    lines = [line.strip() for line in reason.splitlines() if any(map(str.isalnum, line))]
    text = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}" if lines else "not measured"
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."
