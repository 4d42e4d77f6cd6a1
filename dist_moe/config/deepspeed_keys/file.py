"""Reads a JSON file of DeepSpeed: which of its keys agree with a run, and which field sets each of them."""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from dist_moe.config.deepspeed_keys.check import FIELD, Found, allowed_settings, find_keys, key_violation
from dist_moe.config.deepspeed_keys.entries import AUTO, Allowed, Ours, Refused, same
from dist_moe.config.deepspeed_keys.table import ACCUMULATION, MICRO_BATCH, TABLE
from dist_moe.errors import ABSENT, ConfigError, Violation, reason_of
from dist_moe.text import counted, shown
from dist_moe.untrusted import read_json

MICRO_FIELD = "train.micro_batch_size"
REMEDY = "give the path of a JSON file of DeepSpeed, or a mapping of its keys"


def read_deepspeed_json(name: str) -> dict[str, Any]:
    """Read a JSON file of DeepSpeed as untrusted input.

    Args:
        name: Its path; `~` is the home folder.

    Raises:
        ConfigError: It cannot be read, or is not a JSON object.
    """
    try:
        return read_json(Path(os.path.expanduser(name)), follow=True)
    except OSError as error:
        rule = f"cannot be read ({reason_of(error)})"
    except ValueError as error:
        rule = f"cannot be read as JSON ({error})"
    raise ConfigError([Violation(FIELD, name, rule, REMEDY)])


class DeepSpeedFile(NamedTuple):
    """The JSON file of DeepSpeed that train.deepspeed names; an empty one where it names none.

    Attributes:
        path: The file as train.deepspeed gives it.
        settings: Its content.
        violations: Why it could not be read.
    """

    path: str
    settings: dict[str, Any]
    violations: list[Violation]

    def disagreements(
        self, config: BaseModel, workers: int | None = None, broken: Collection[str] = ()
    ) -> list[Violation]:
        """Return a violation for each key that may not be passed on, or that says other than the configuration.

        Args:
            config: The configuration of the run.
            workers: The processes of the run; None where they are not known.
            broken: Dotted fields whose intended value is not known, with which nothing is compared.
        """
        values = config.model_dump()
        train: Any = values["train"]
        train["schedule_steps"] = train["schedule_steps"] or train["steps"]
        micro = train["micro_batch_size"]
        if micro == AUTO:
            micro = _auto_micro_batch(config, workers, broken)
        run = Run(values, workers, micro, broken)
        return [violation for one in find_keys(self.settings) if (violation := self._violation(one, run)) is not None]

    def _violation(self, found: Found, run: "Run") -> Violation | None:
        where = f"{self.path}: "
        if not isinstance(found.entry, Ours):
            return key_violation(found, where)
        if found.entry.field in run.broken:
            return None
        return _disagreement(found, where, run, self.settings.get(MICRO_BATCH))


class Run(NamedTuple):
    """What a file of DeepSpeed is compared with.

    Attributes:
        values: The sections of the run and their fields.
        workers: The processes of the run; None where they are not known.
        micro: The sequences of a micro-batch, also where the field is auto; None where they are not known.
        broken: Dotted fields whose intended value is not known, with which nothing is compared.
    """

    values: Mapping[str, Mapping[str, Any]]
    workers: int | None
    micro: int | None
    broken: Collection[str]

    def shown(self, field: str) -> str:
        """Return a field with its value, and with what auto is."""
        section, _, name = field.partition(".")
        value = self.values[section][name]
        text = f"{field}={shown(value)}"
        return f"{text} ({self.micro})" if value == AUTO and field == MICRO_FIELD and self.micro is not None else text


def _auto_micro_batch(config: Any, workers: int | None, broken: Collection[str]) -> int | None:
    if workers is None or not {"train.global_batch_size", "data.sequence_length", MICRO_FIELD}.isdisjoint(broken):
        return None
    micro: int = config.train.micro_batch_for(workers, config.data.sequence_length)
    return micro


def take_deepspeed_file(settings: dict[Any, Any]) -> DeepSpeedFile:
    """Read the file that train.deepspeed names, and put in its place those of its keys that are passed to DeepSpeed.

    Args:
        settings: The nested settings of a run.
    """
    train = settings.get("train")
    name = train.get("deepspeed") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(name, str):
        return DeepSpeedFile("", {}, [])
    try:
        content = read_deepspeed_json(name)
    except ConfigError as error:
        train["deepspeed"] = {}
        return DeepSpeedFile(name, {}, error.violations)
    train["deepspeed"] = allowed_settings(content)
    return DeepSpeedFile(name, content, [])


def is_deepspeed_json(settings: Mapping[Any, Any], sections: Iterable[str]) -> bool:
    """Whether settings are those of DeepSpeed and not of a run.

    Args:
        settings: The content of a file.
        sections: The names of the sections of a run.
    """
    both = {"checkpoint"}  # of the keys, the only one that a run has, too
    top = {key.partition(".")[0] for key in TABLE} - both
    return bool(top.intersection(settings)) and not (set(sections) - both).intersection(settings)


def describe_keys(path: str, settings: Mapping[Any, Any]) -> list[Violation]:
    """Return one line for each key of a file of DeepSpeed that was given in place of the YAML file of a run.

    Args:
        path: The file, as it is named in messages.
        settings: Its content.
    """
    first = Violation(
        path,
        ABSENT,
        "is a configuration of DeepSpeed, not the YAML file of a run",
        f"begin with configs/debug.yaml, and set {FIELD}={path} there or follow the lines below",
    )
    return [first, *(_description(one) for one in find_keys(settings))]


def _description(found: Found) -> Violation:
    key, value, entry = found.key, found.value, found.entry
    problem = key_violation(found, "")
    if problem is not None:
        return problem
    if isinstance(entry, Allowed) and value != AUTO:
        return Violation(key, value, "is allowed", f"write {FIELD}.{key}={shown(entry.rule.passed(value))}")
    if isinstance(entry, Refused):
        return Violation(key, value, "has no effect", "leave it out")
    if not isinstance(entry, Ours) or value == AUTO:
        field = f"; {entry.sets}" if isinstance(entry, Ours) else ""
        return Violation(key, value, "leaves the value open", f"leave it out{field}")
    if key == ACCUMULATION:
        remedy = "write train.global_batch_size = workers * train.micro_batch_size * this number"
        return Violation(key, value, "follows from other fields here", remedy)
    try:
        remedy = f"write {entry.field}={shown(entry.convert(value))}" if entry.convert else f"set {entry.field}"
    except ValueError as error:
        return Violation(key, value, str(error), f"set {entry.field} to what it accepts")
    return Violation(key, value, f"is set by {entry.field} here", remedy)


def _disagreement(found: Found, where: str, run: Run, micro_batch: Any) -> Violation | None:
    """Return how a key that a field here sets differs from the run.

    Args:
        found: The key.
        where: What to write before it.
        run: The run.
        micro_batch: The micro-batch of the file, if it has one.
    """
    entry, value = found.entry, found.value
    assert isinstance(entry, Ours)
    key = f"{where}{found.key}"
    if value == AUTO:
        return None
    if entry.convert is None:
        return Violation(key, value, "should be a mapping", f"remove it; {entry.sets}")
    try:
        wanted = entry.convert(value)
    except ValueError as error:
        return Violation(key, value, str(error), f"remove it; {entry.sets}")
    if found.key == ACCUMULATION:
        return _other_accumulation(key, wanted, run, micro_batch)
    section, _, name = entry.field.partition(".")
    has = run.micro if entry.field == MICRO_FIELD else run.values[section][name]
    if same(wanted, has) or (entry.field == MICRO_FIELD and has is None):
        return None
    rule = f"is not what {run.shown(entry.field)} sets"
    return Violation(key, value, rule, f"set {entry.field}={shown(wanted)}, or remove it from the file")


def _other_accumulation(key: str, wanted: int, run: Run, micro_batch: Any) -> Violation | None:
    """Return how a number of micro-batches differs from that of the run; the file's own micro-batch is preferred."""
    batch, given = run.values["train"]["global_batch_size"], type(micro_batch) is int and micro_batch > 0
    micro = micro_batch if given else run.micro
    fields = f"train.global_batch_size={batch} and "
    fields += f"{MICRO_FIELD}={micro}" if given else run.shown(MICRO_FIELD)
    remove = "remove it from the file"
    if run.workers is None or micro is None:
        fits = wanted > 0 and batch % (wanted * (micro or 1)) == 0
        return None if fits else Violation(key, wanted, f"does not fit {fields}", remove)
    if batch == wanted * micro * run.workers:
        return None
    rule = f"is not what {fields} set for {counted(run.workers, 'worker')}"
    steps = max(wanted, 1) * run.workers
    remedy = f"set train.global_batch_size={steps * micro}"
    if not given and run.values["train"]["micro_batch_size"] == AUTO:
        # Another global batch would have another automatic micro-batch.
        remedy = f"set {MICRO_FIELD}={batch // steps}" if batch % steps == 0 else ""
    return Violation(key, wanted, rule, f"{remedy}, or {remove}" if remedy else remove)
