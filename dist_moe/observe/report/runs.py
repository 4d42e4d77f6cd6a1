"""Reads run folders for a report: what a run is, what it logged, how it ended, and what could not be read."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from dist_moe.errors import UserError, reason_of
from dist_moe.observe.report.lines import EventLine, Metrics, StepLine, read_events, read_metrics
from dist_moe.policies.shares import Shares, shares_in_file
from dist_moe.text import listed, plain_text
from dist_moe.untrusted import parse_json, read_text
from dist_moe.worker.contract import ErrorReport

MOST_RUNS = 8
"""Runs of one report: as many colors are told apart."""
DEEPEST = 50
MOST_ERROR_FILES = 64
LARGEST_ERROR_FILE = 1 << 20
Content = TypeVar("Content")


class RunState(StrEnum):
    """How far a run is. A run that does not say how it ended may still be in progress."""

    FINISHED = "finished"
    STOPPED = "stopped on request"
    FAILED = "failed"
    OPEN = "not finished"


@dataclass(frozen=True)
class RunData:
    """What the files of one run say.

    Attributes:
        folder: run.dir.
        name: Of the folder; with those above it where two runs have one name.
        description: The content of run.json; empty where it cannot be read.
        metrics: The content of metrics.jsonl.
        events: The lines of events.jsonl.
        errors: The errors of workers, the earliest first.
        problems: What could not be read, in words.
    """

    folder: Path
    name: str
    description: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    events: Sequence[EventLine] = ()
    errors: Sequence[ErrorReport] = ()
    problems: Sequence[str] = ()

    def value(self, *keys: str) -> Any:
        """Return a value of run.json by its keys; None where it is missing."""
        found: Any = self.description
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, every field filled in; empty where it is not known."""
        config = self.value("config")
        return config if isinstance(config, Mapping) else {}

    @property
    def has_targets(self) -> bool:
        """Whether the experts of the run have targets of their own (`balance.shares`)."""
        return self.value("config", "balance", "shares") is not None

    def target_shares(self, experts: int) -> Shares:
        """Return the target shares of the experts of a layer; None for equal ones, and where they cannot be read."""
        return shares_in_file(self.value("config", "balance", "shares"), experts)

    @property
    def taken(self) -> list[StepLine]:
        """The logged steps, without the skipped ones."""
        return [step for step in self.metrics.steps if not step.skipped]

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 without any."""
        return self.metrics.steps[-1].step if self.metrics.steps else 0

    @property
    def planned_steps(self) -> int | None:
        """`train.steps`; None where it is not known."""
        steps = self.value("config", "train", "steps")
        return steps if type(steps) is int and steps > 0 else None

    @property
    def state(self) -> RunState:
        """How the last process of the run ended, as far as its files say."""
        if self.errors:
            return RunState.FAILED
        ends = [event.event for event in self.events if event.event in ("start", "stopped", "finished")]
        if ends:
            return {"stopped": RunState.STOPPED, "finished": RunState.FINISHED}.get(ends[-1], RunState.OPEN)
        evaluated = self.metrics.validations and self.metrics.validations[-1].step >= self.last_step
        return RunState.FINISHED if evaluated else RunState.OPEN


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read the folders of runs, in the order given.

    Args:
        folders: run.dir of each run, or an `earlier-N` folder in it.

    Raises:
        UserError: There are none, too many or one twice, or a folder is not that of a run.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(
            f"{len(folders)} runs; a report shows at most {MOST_RUNS}, in colors that are told apart; name fewer"
        )
    resolved = [folder.resolve() for folder in folders]
    if twice := next((folder for folder, count in Counter(resolved).items() if count > 1), None):
        raise UserError(f"{twice} is named twice; name each run once")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    longest = max((len(folder.parts) for folder in folders), default=1)
    for parts in range(1, longest + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return [plain_text(name) for name in names]


def _read_run(folder: Path, name: str) -> RunData:
    problems = list[str]()
    description = _read(folder / "run.json", _read_description, problems)
    metrics = _read(folder / "metrics.jsonl", read_metrics, problems)
    if description is None and metrics is None:
        raise UserError(_no_run(folder, problems))
    found = metrics or Metrics()
    if metrics is not None and not metrics.steps:
        problems.append("metrics.jsonl: no step has been logged yet")
    path = folder / "events.jsonl"
    # An earlier version wrote none.
    lines, of_events = (_read(path, read_events, problems) if path.exists() else None) or ([], [])
    return RunData(
        folder=folder,
        name=name,
        description=description or {},
        metrics=found,
        events=lines,
        errors=_of_last_start(_read_errors(folder), lines),
        problems=[plain_text(problem) for problem in (*problems, *found.problems, *of_events)],
    )


def _read(path: Path, read: Callable[[Path], Content], problems: list[str]) -> Content | None:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({reason_of(error)})")
    return None


def _read_description(path: Path) -> dict[str, Any]:
    description = parse_json(read_text(path, follow=True))
    if _depth(description) > DEEPEST:
        raise ValueError("it nests too deeply")
    return description


def _depth(value: Any) -> int:
    """Return how deep a value of JSON nests, at most `DEEPEST + 1`."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        children = [
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        ]
        level, depth = [child for values in children for child in values], depth + 1
    return depth


def _no_run(folder: Path, problems: Sequence[str]) -> str:
    """Word why a folder is not that of a run, with the runs in it."""
    if not folder.is_dir():
        return f"{folder} is not a folder; name the run.dir of a run"
    inside = sorted(path.parent.name for path in folder.glob("*/run.json"))
    if inside:
        return f"{folder} is not a run, and has the runs {listed(inside, last='and', most=5)}; name one or some of them"
    above = next((path for path in folder.resolve().parents if (path / "run.json").is_file()), None)
    if above is not None:
        return f"{folder} is inside the run {above}; name that folder"
    return f"{folder} is not a run ({listed(problems, last='and')}); name the run.dir of a run that has started"


def _of_last_start(errors: Sequence[ErrorReport], events: Sequence[EventLine]) -> list[ErrorReport]:
    """Leave out the errors of ranks that the last start no longer had; each of its workers has removed its own.

    One that is later than that start is of a process that failed before it could record its own start.
    """
    start = next((event for event in reversed(events) if event.event == "start"), None)
    if start is None or start.workers is None:
        return list(errors)
    try:
        began = datetime.fromisoformat(start.time).timestamp()
    except (ValueError, OverflowError):
        return list(errors)
    return [error for error in errors if error.rank < start.workers or error.time >= began]


def _read_errors(folder: Path) -> list[ErrorReport]:
    reports = []
    for path in sorted(folder.glob("errors/rank-*.txt"))[:MOST_ERROR_FILES]:
        try:
            reports.append(ErrorReport.parse(read_text(path, follow=True, largest=LARGEST_ERROR_FILE)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            # The file itself says that a worker failed.
            reports.append(ErrorReport(float("inf"), -1, 1, "Error", f"{path.name} cannot be read"))
    return sorted(reports, key=lambda report: report.time)
