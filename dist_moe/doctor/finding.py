"""The result of one check, and lists of results as a table and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dist_moe.files import write_atomically
from dist_moe.untrusted import read_text


class Outcome(StrEnum):
    """How a check ended."""

    passed = "pass"
    warned = "warn"
    failed = "fail"
    not_applicable = "n/a"


STYLES = {
    Outcome.passed: "green",
    Outcome.warned: "yellow",
    Outcome.failed: "bold red",
    Outcome.not_applicable: "dim",
}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check.
        outcome: How it ended.
        found: What was measured, with units.
        remedy: What to do about it; empty if there is nothing to do.
    """

    check: str
    outcome: Outcome
    found: str
    remedy: str = ""


def table(findings: Sequence[Finding]) -> Table:
    """Build a table of the findings, with each remedy below its finding."""
    result = Table("check", "", "found, and what to do", title="dist-moe doctor", title_justify="left")
    for finding in findings:
        text = Text(finding.found)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="bold")
        result.add_row(finding.check, Text(finding.outcome.value, style=STYLES[finding.outcome]), text)
    return result


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """Write the findings as one JSON list."""
    write_atomically(path, json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")


def read_json(path: Path) -> list[Finding]:
    """Read the list that `write_json` wrote."""
    return [finding_from_dict(record) for record in json.loads(read_text(path))]


def finding_from_dict(record: dict[str, str]) -> Finding:
    """Rebuild a finding from its plain values."""
    return Finding(record["check"], Outcome(record["outcome"]), record["found"], record["remedy"])
