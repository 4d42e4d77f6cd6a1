"""The result of one injected fault: what was done, the evidence that it took effect, and what failed afterwards."""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

GROUPS = ("process", "file")
REQUIRED = {"process": 40, "during a save": 10, "file": 200}
"""How many confirmed faults a whole campaign must survive; those during a save are process faults."""


@dataclass(frozen=True)
class Row:
    """One injected fault.

    Attributes:
        group: "process" or "file".
        kind: What was done to what.
        seed: Determines moment, file, position and length.
        during_save: Whether a save was in progress.
        evidence: That the fault took effect, and when; empty if it missed, and then the row does not count.
        recovery: How the run continued.
        failures: Every difference from the expected outcome.
        seconds: Duration.
    """

    group: str
    kind: str
    seed: int
    during_save: bool
    evidence: str
    recovery: str
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def survived(self) -> bool:
        """Whether the fault took effect and the outcome is that of the undisturbed run."""
        return bool(self.evidence) and not self.failures

    def append_to(self, path: Path) -> None:
        """Append the row at once, so that an interrupted campaign keeps its results."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(self)) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of the campaign so far."""
    if not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def missing(rows: Sequence[Row], groups: Collection[str] = GROUPS, kinds: Sequence[str] | None = None) -> list[str]:
    """What a campaign of these groups lacks, in words, and every failure; empty if it passes.

    Args:
        rows: The results.
        groups: The groups that were run.
        kinds: For a short campaign, which must survive one fault of each of them; None for a whole one.
    """
    survived = [row for row in rows if row.survived]
    failures = [f"{row.kind}, seed {row.seed}: {'; '.join(row.failures)}" for row in rows if row.failures]
    if kinds is not None:
        return [f"no {kind}" for kind in kinds if kind not in {row.kind for row in survived}] + failures
    counts = Counter(row.group for row in survived)
    counts["during a save"] = sum(row.during_save for row in survived if row.group == "process")
    required = {
        name: count
        for name, count in REQUIRED.items()
        if name in groups or ("process" in groups and name not in GROUPS)
    }
    lacking = [f"{counts[name]} of {count} {name} faults" for name, count in required.items() if counts[name] < count]
    return lacking + failures


def markdown(rows: Sequence[Row]) -> str:
    """A table by kind: injected, confirmed, during a save, survived, and how the runs continued."""
    lines = [
        "| fault | injected | confirmed | during a save | survived | the run continued |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.group, row.kind), []).append(row)
    for (_, kind), of_kind in sorted(kinds.items(), key=lambda item: (item[0][0] != "process", item[0][1])):
        confirmed = [row for row in of_kind if row.evidence]
        recoveries = Counter(row.recovery for row in confirmed).most_common()
        ways = ", ".join(f"{count} {recovery}" for recovery, count in recoveries)
        during_save, survived = sum(row.during_save for row in confirmed), sum(row.survived for row in of_kind)
        lines.append(f"| {kind} | {len(of_kind)} | {len(confirmed)} | {during_save} | {survived} | {ways} |")
    return "\n".join(lines)
