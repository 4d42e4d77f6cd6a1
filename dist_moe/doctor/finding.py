"""What a check has found, as a record, a table and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rich.table import Table
from rich.text import Text


class Outcome(StrEnum):
    """How a check ended."""

    passed = "pass"
    warned = "warn"
    failed = "fail"
    idle = "n/a"


STYLES = {Outcome.passed: "green", Outcome.warned: "yellow", Outcome.failed: "bold red", Outcome.idle: "dim"}


@dataclass(frozen=True)
class Finding:
    """check: its name. found: what was seen, with units. remedy: what to do, empty where there is nothing."""

    check: str
    outcome: Outcome
    found: str
    remedy: str = ""


def table(findings: Sequence[Finding]) -> Table:
    """Of all findings, a remedy below what it mends."""
    drawn = Table("check", "", "found, and what to do", title="dist-moe doctor", title_justify="left")
    for finding in findings:
        told = Text(finding.found)
        if finding.remedy:
            told.append(f"\n-> {finding.remedy}", style="bold")
        drawn.add_row(finding.check, Text(finding.outcome.value, style=STYLES[finding.outcome]), told)
    return drawn


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """Write them as one JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> list[Finding]:
    """What `write_json` wrote."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    return [Finding(**{**one, "outcome": Outcome(one["outcome"])}) for one in plain]


def bytes_in_words(count: float) -> str:
    """12.3 MB, in units of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
