"""Reads a JSON file of DeepSpeed: which of its keys agree with a run, and which field sets each of them."""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from dist_moe.config.deepspeed_keys.check import FIELD, Found, allowed_settings, find_keys, key_violation
from dist_moe.config.deepspeed_keys.entries import AUTO, Allowed, Ours, Refused, same
from dist_moe.config.deepspeed_keys.table import ACCUMULATION, MICRO_BATCH, TABLE
from dist_moe.errors import ABSENT, ConfigError, Violation
from dist_moe.text import counted, shown
from dist_moe.untrusted import read_json

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
        rule = f"cannot be read ({error.strerror or error})"
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
        values["train"]["schedule_steps"] = values["train"]["schedule_steps"] or values["train"]["steps"]
        return file_violations(self.path, self.settings, values, workers, broken)


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


def file_violations(
    path: str,
    settings: Mapping[Any, Any],
    values: Mapping[str, Mapping[str, Any]],
    workers: int | None,
    broken: Collection[str] = (),
) -> list[Violation]:
    """Return a violation for each key of a file that may not be passed on, or that says other than the run.

    Args:
        path: The file, as it is named in messages.
        settings: Its content.
        values: The sections of the run and their fields.
        workers: The processes of the run; None where they are not known.
        broken: Dotted fields whose intended value is not known, with which nothing is compared.
    """
    where = f"{path}: "
    found = []
    for one in find_keys(settings):
        if isinstance(one.entry, Ours):
            if one.entry.field in broken:
                continue
            violation = _disagreement(one, where, values, workers, settings.get(MICRO_BATCH))
        else:
            violation = key_violation(one, where)
        if violation is not None:
            found.append(violation)
    return found


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
        field = f"; {entry.field} sets it" if isinstance(entry, Ours) else ""
        return Violation(key, value, "leaves the value open", f"leave it out{field}")
    if key == ACCUMULATION:
        remedy = "write train.global_batch_size = workers * train.micro_batch_size * this number"
        return Violation(key, value, "follows from other fields here", remedy)
    try:
        remedy = f"write {entry.field}={shown(entry.convert(value))}" if entry.convert else f"set {entry.field}"
    except ValueError as error:
        return Violation(key, value, str(error), f"set {entry.field} to what it accepts")
    return Violation(key, value, f"is set by {entry.field} here", remedy)


def _disagreement(
    found: Found, where: str, values: Mapping[str, Mapping[str, Any]], workers: int | None, micro_batch: Any
) -> Violation | None:
    entry, value = found.entry, found.value
    assert isinstance(entry, Ours)
    key = f"{where}{found.key}"
    if value == AUTO:
        return None
    if entry.convert is None:
        return Violation(key, value, "should be a mapping", f"remove it; {entry.field} sets it")
    try:
        wanted = entry.convert(value)
    except ValueError as error:
        return Violation(key, value, str(error), f"remove it; {entry.field} sets it")
    if found.key == ACCUMULATION:
        micro = micro_batch if isinstance(micro_batch, int) else values["train"]["micro_batch_size"]
        return _other_accumulation(key, wanted, values["train"]["global_batch_size"], micro, workers)
    section, _, name = entry.field.partition(".")
    has = values[section][name]
    if _equal(wanted, has):
        return None
    rule = f"is not what {entry.field}={shown(has)} sets"
    return Violation(key, value, rule, f"set {entry.field}={shown(wanted)}, or remove it from the file")


def _other_accumulation(key: str, wanted: int, batch: int, micro: int, workers: int | None) -> Violation | None:
    fields = f"train.global_batch_size={batch} and train.micro_batch_size={micro}"
    if workers is None:
        fits = wanted > 0 and micro > 0 and batch % (micro * wanted) == 0
        return None if fits else Violation(key, wanted, f"does not fit {fields}", "remove it from the file")
    if batch == wanted * micro * workers:
        return None
    rule = f"is not what {fields} set for {counted(workers, 'worker')}"
    remedy = f"set train.global_batch_size={max(wanted, 1) * micro * workers}, or remove it from the file"
    return Violation(key, wanted, rule, remedy)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return same(one, other)
