"""Measured cases: what bench.json and the files in benchmarks/results/ hold, and the ratios that follow."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import PACKAGE, BlockCase, Case, StartCase, StepCase
from benchmarks.environment import ROOT, hardware_name
from benchmarks.row import LIMIT, Row
from benchmarks.statistics import Spread, speed_ratio, spread

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Measured:
    """One case, measured in one run.

    Attributes:
        case: Its name.
        kind: "step", "block" or "start".
        tokens: Tokens of one step over all workers, or of one forward of the block; 0 for a start.
        environment: The machine and the software (`benchmarks.environment.describe`).
        rows: One for each program.
    """

    case: str
    kind: str
    tokens: int
    environment: Mapping[str, Any]
    rows: list[Row]


class Ratio(NamedTuple):
    """A program of this package against another program of the same case.

    Attributes:
        case: The case.
        program: The program of this package.
        other: The program that it is compared with.
        speed: How many times as fast it is.
        memory: Its peak memory divided by that of the other; None where it is not known.
    """

    case: str
    program: str
    other: str
    speed: Spread
    memory: float | None


def measured(case: Case, environment: Mapping[str, Any], rows: list[Row]) -> Measured:
    """Return the record of a case."""
    kind = {StepCase: "step", BlockCase: "block", StartCase: "start"}[type(case)]
    return Measured(case.name, kind, 0 if isinstance(case, StartCase) else case.tokens, environment, rows)


def ratios(record: Measured) -> list[Ratio]:
    """Return the ratios of each program of this package to each other one.

    Where all programs are of this package, those after the first are compared with the first.
    """
    rows = [row for row in record.rows if row.measured]
    own = [row for row in rows if row.name.startswith(PACKAGE)]
    others = [row for row in rows if row not in own]
    pairs = [(row, other) for row in own for other in others]
    if not others or (len(others) == 1 and others[0].name == LIMIT):
        pairs += [(row, own[0]) for row in own[1:]]
    return [
        Ratio(record.case, row.name, other.name, speed_ratio(row.seconds, other.seconds), memory_ratio(row, other))
        for row, other in pairs
    ]


def memory_ratio(row: Row, other: Row) -> float | None:
    """Return the ratio of the peaks of two programs, where both are known."""
    return None if row.peak_mib is None or other.peak_mib is None else row.peak_mib / other.peak_mib


def tokens_per_s(record: Measured, row: Row) -> Spread:
    """Return the tokens per second of a row that was measured."""
    return spread([record.tokens / seconds for seconds in row.seconds])


def write_results(path: Path, records: Iterable[Measured]) -> None:
    """Write records as JSON, after those of the same case that the file keeps.

    The file keeps a record until a newer one has measured all of its programs. Rows of two runs are not put into one
    record, because its ratios would compare times of two runs.
    """
    newer = list(records)
    older = read_results(path) if path.is_file() else []
    kept = [record for record in older if not any(replaces(other, record) for other in newer)]
    order = list(dict.fromkeys(record.case for record in (*older, *newer)))
    kept = sorted([*kept, *newer], key=lambda record: order.index(record.case))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(record) for record in kept], indent=1) + "\n")


def replaces(newer: Measured, older: Measured) -> bool:
    """Return whether both are of one case, and the newer record has measured each program of the older one."""
    measured_names = {row.name for row in newer.rows if row.measured}
    return newer.case == older.case and measured_names >= {row.name for row in older.rows if row.measured}


def read_results(path: Path) -> list[Measured]:
    """Read what `write_results` wrote."""
    items = json.loads(path.read_text())
    return [Measured(**{**item, "rows": [Row(**row) for row in item["rows"]]}) for item in items]


def results_path(environment: Mapping[str, Any]) -> Path:
    """Return the file for results of this kind of machine."""
    return RESULTS / f"{hardware_name(environment)}.json"
