"""What differs between runs: their configurations, their machines, and whether their results can be compared.

Values of files are formatted as text here; where they are shown escapes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_moe.config.differences import differences, set_values
from dist_moe.errors import ABSENT
from dist_moe.observe.report.runs import RunData, RunState
from dist_moe.text import counted, format_bytes, listed, plain_text, shown

PLACE = frozenset({"run.dir"})
"""Fields that differ between any two runs."""
MOST_VALUES = 500
NOT_SET = "not set"
COMMIT = "commit"
CORPUS = ("world", "corpus")
"""Where run.json has the digest of the text and its tokenizer."""
LONGEST_VALUE, LONGEST_DIGEST = 40, 12


@dataclass(frozen=True)
class Fact:
    """One property of every run, as text.

    Attributes:
        name: Of the property.
        values: Of each run, in their order.
    """

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs have different values."""
        return len(set(self.values)) > 1


def words(value: Any) -> str:
    """Format a value of a file in one line without control characters."""
    return NOT_SET if value is ABSENT else plain_text(shown(value))


def config_differences(runs: Sequence[RunData]) -> list[Fact]:
    """Return the fields of the configuration in which any of the runs differs from another."""
    known = [run for run in runs if run.config]
    keys: dict[str, None] = {}
    for run in known[1:]:
        keys |= {key: None for key, _, _ in differences(known[0].config, run.config) if key not in PLACE}
    return _facts(runs, list(keys)[:MOST_VALUES])


def config_settings(runs: Sequence[RunData]) -> list[Fact]:
    """Return the fields in which the configuration of any of the runs differs from the defaults."""
    keys = dict.fromkeys(key for run in runs for key in set_values(run.config))
    return _facts(runs, list(keys)[:MOST_VALUES])


def _facts(runs: Sequence[RunData], keys: Sequence[str]) -> list[Fact]:
    return [Fact(plain_text(key), tuple(words(_at(run.config, key)) for run in runs)) for key in keys]


def _at(config: Any, key: str) -> Any:
    """Return the value at a dotted key; ABSENT where there is none. A key of a mapping may have dots itself."""
    if not isinstance(config, dict):
        return ABSENT
    if key in config:
        return config[key]
    for head, value in config.items():
        if key.startswith(f"{head}.") and (found := _at(value, key.removeprefix(f"{head}."))) is not ABSENT:
            return found
    return ABSENT


def machine_facts(runs: Sequence[RunData]) -> list[Fact]:
    """Return where and by what each run was made."""
    facts = [Fact(name, tuple(_text(run.value(*keys)) for run in runs)) for name, keys in _MACHINE.items()]
    facts.insert(1, Fact(COMMIT, tuple(_commit(run) for run in runs)))
    versions = dict.fromkeys(
        name for run in runs if isinstance(found := run.value("versions"), dict) for name in list(found)[:50]
    )
    facts += [Fact(plain_text(name), tuple(_text(run.value("versions", name)) for run in runs)) for name in versions]
    return [fact for fact in facts if any(value != "-" for value in fact.values)]


_MACHINE: Mapping[str, tuple[str, ...]] = {
    "started (UTC)": ("started",),
    "command": ("argv",),
    "seed": ("config", "run", "seed"),
    "workers": ("world", "workers"),
    "expert parallel": ("world", "expert_parallel"),
    "micro-batches per step": ("world", "accumulation"),
    "backend": ("world", "backend"),
    "device": ("world", "device"),
    "launcher": ("world", "launcher"),
    "processor": ("host", "cpu"),
    "cores": ("host", "cores"),
    "accelerators": ("host", "accelerators"),
    "system": ("host", "system"),
    "digest of the text": CORPUS,
}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(words(item) for item in value) or "-"
    return "-" if value is None else words(value)


def _commit(run: RunData) -> str:
    commit, dirty = run.value("source", "commit"), run.value("source", "dirty")
    return f"{_text(commit)}{' with changes' if dirty is True else ''}"


def history(run: RunData) -> list[tuple[str, str, str]]:
    """Return what happened to a run, besides warnings: (time, step, words)."""
    rows, starts = [], 0
    for event in run.events:
        match event.event:
            case "start":
                starts += 1
                place = f" from {event.resumed_from}" if event.resumed_from else ""
                verb = "started" if event.step == 0 else f"resumed after step {event.step:,}{place}"
                workers = "" if event.workers is None else f" with {counted(event.workers, 'worker')}"
                rows.append((event, f"{verb}{workers}"))
            case "stopped":
                rows.append((event, "stopped on request"))
            case "finished":
                rows.append((event, "finished"))
    return [(plain_text(event.time.replace("T", " ")), f"{event.step:,}", plain_text(what)) for event, what in rows]


def warnings(run: RunData) -> list[tuple[str, str]]:
    """Return the warnings of a run: (step, words)."""
    return [(f"{event.step:,}", plain_text(event.text)) for event in run.events if event.event == "warning"]


def checkpoints(run: RunData) -> str:
    """Describe the checkpoints of a run in a sentence; "" without any."""
    lines = run.metrics.checkpoints
    if not lines:
        return ""
    sizes, stalls = [line.bytes or 0 for line in lines], [line.stall_ms or 0.0 for line in lines]
    return (
        f"{counted(len(lines), 'checkpoint')}, the last one of {format_bytes(sizes[-1])} after step "
        f"{lines[-1].step:,}; training stalled for {sum(stalls) / len(stalls):,.0f} ms for each"
    )


def progress(run: RunData) -> str:
    """Say how far a run is."""
    planned = "" if run.planned_steps is None else f" of {run.planned_steps:,}"
    steps = f"step {run.last_step:,}{planned}"
    match run.state:
        case RunState.FINISHED:
            return f"finished, {steps}"
        case RunState.STOPPED:
            return f"stopped on request after {steps}; the same command resumes"
        case RunState.FAILED:
            return f"failed after {steps}"
    return f"in progress or interrupted, logged until {steps}"


def not_comparable(runs: Sequence[RunData]) -> list[str]:
    """Say which results of the runs cannot be compared, and why; nothing where all can."""
    found = list[str]()
    if open_runs := [run.name for run in runs if run.state != RunState.FINISHED]:
        be = "is" if len(open_runs) == 1 else "are"
        found.append(f"{listed(open_runs, last='and')} {be} not finished, so the results are of different steps")
    for keys, rule in _SAME_LOSS.items():
        if len(values := _distinct(runs, keys)) > 1:
            found.append(f"{rule} ({listed(values, last='and', most=4)}), so the losses are not comparable")
    tokens = {run.name: run.metrics.steps[-1].tokens for run in runs if run.metrics.steps}
    if len(set(tokens.values())) > 1:
        each = listed((f"{name}: {count or 0:,}" for name, count in tokens.items()), last="and", most=4)
        found.append(f"they are trained on different numbers of tokens ({each})")
    last = {run.name: run.metrics.validations[-1].metrics for run in runs if run.metrics.validations}
    evaluated = {name: measured.get("tokens", measured.get("examples")) for name, measured in last.items()}
    if len(set(evaluated.values())) > 1:
        each = listed((f"{name}: {count or 0:,.0f}" for name, count in evaluated.items()), last="and", most=4)
        found.append(f"they are evaluated on different numbers of tokens or texts ({each})")
    for keys, rule in _SAME_SPEED.items():
        if len(values := _distinct(runs, keys)) > 1:
            found.append(f"{rule} ({listed(values, last='and', most=4)}), so the speeds are not comparable")
            break
    return found


_SAME_LOSS: Mapping[tuple[str, ...], str] = {
    ("config", "task", "kind"): "their tasks differ",
    ("config", "task", "class_weights"): "their class weights, which the training loss has, differ",
    CORPUS: "their texts or tokenizers differ",
    ("config", "data", "sequence_length"): "their sequence lengths differ",
}
_SAME_SPEED: Mapping[tuple[str, ...], str] = {
    ("host", "accelerators"): "their accelerators differ",
    ("host", "cpu"): "their processors differ",
    ("world", "workers"): "their numbers of workers differ",
}


def _distinct(runs: Sequence[RunData], keys: tuple[str, ...]) -> list[str]:
    """Return the different values that runs have at a place of run.json; runs without run.json do not count."""
    longest = LONGEST_DIGEST if keys == CORPUS else LONGEST_VALUE
    return list(dict.fromkeys(words(run.value(*keys))[:longest] for run in runs if run.description))
