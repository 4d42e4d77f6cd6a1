"""One injected fault as a row: what was done, the proof that it struck, and what was found afterwards."""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

GROUPS = ("process", "file")
WANTED = {"process": 40, "inside a save": 10, "file": 200}
"""How many proven faults a whole campaign has to hold; those inside a save are of processes."""


@dataclass(frozen=True)
class Row:
    """group: "process" or "file". kind: what was done, to what. seed: draws everything. inside: whether in a save.

    proof: that it struck, and when; empty where it missed, and then the row counts for nothing. onward: how the run
    went on. faults: what was not as it has to be.
    """

    group: str
    kind: str
    seed: int
    inside: bool
    proof: str
    onward: str
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether it struck and the run is as if nothing had been."""
        return bool(self.proof) and not self.faults

    def append_to(self, path: Path) -> None:
        """Write it down at once, so that a campaign that is cut short keeps what it has found."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(self)) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier part of a campaign."""
    if not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def missing(rows: Sequence[Row], groups: Collection[str] = GROUPS, kinds: Sequence[str] | None = None) -> list[str]:
    """What a campaign of these groups lacks, in words; nothing where all has struck and all is held.

    kinds: of a short one, which has to hold one fault of each of them; None for a whole one.
    """
    held = [row for row in rows if row.held]
    wrong = [f"{row.kind}, seed {row.seed}: {'; '.join(row.faults)}" for row in rows if row.faults]
    if kinds is not None:
        return [f"no {kind}" for kind in kinds if kind not in {row.kind for row in held}] + wrong
    counts = Counter(row.group for row in held)
    counts["inside a save"] = sum(row.inside for row in held if row.group == "process")
    wanted = {
        name: least for name, least in WANTED.items() if name in groups or ("process" in groups and name not in GROUPS)
    }
    found = [f"{counts[name]} of {least} {name} faults" for name, least in wanted.items() if counts[name] < least]
    return found + wrong


def markdown(rows: Sequence[Row]) -> str:
    """A table by kind: injected, proven, inside a save, held, and how the runs went on."""
    lines = ["| fault | injected | struck | inside a save | held | how it went on |", "|---|---|---|---|---|---|"]
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.group, row.kind), []).append(row)
    for (_, kind), of_kind in sorted(kinds.items(), key=lambda item: (item[0][0] != "process", item[0][1])):
        struck = [row for row in of_kind if row.proof]
        ways = ", ".join(f"{count} {way}" for way, count in Counter(row.onward for row in struck).most_common())
        inside, held = sum(row.inside for row in struck), sum(row.held for row in of_kind)
        lines.append(f"| {kind} | {len(of_kind)} | {len(struck)} | {inside} | {held} | {ways} |")
    return "\n".join(lines)
