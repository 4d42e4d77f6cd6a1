"""Validates settings, and words pydantic's errors as violations: the key as it is written, the rule, the remedy."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dist_moe.config.schema import Config
from dist_moe.config.sections.balance import balance_fields
from dist_moe.errors import ABSENT, ConfigError, Violation
from dist_moe.policies.registry import POLICIES, policies_with
from dist_moe.section import BROKEN_RULES, RULES, rule_of
from dist_moe.text import listed, nearest, shown

BALANCE = "balance"
# Values for required fields whose own value is invalid, so that the rest can be checked.
PLACEHOLDERS: Mapping[str, Mapping[str, Any]] = {
    "model": {"architecture": "deepseek_v3"},
    "data": {"sequence_length": 2},
    "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 0.0},
}
UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
INT, FLOAT = RULES["int_type"], RULES["float_type"]
CLOSE = 0.8
"""How like a key of a section a key without a section must be (0 to 1) for the section to be suggested."""


def validate(settings: Mapping[Any, Any]) -> Config:
    """Make a `Config` of nested settings; a section that is None has its defaults.

    Raises:
        ConfigError: With each unknown key, missing field, and value of the wrong type or out of range.
    """
    try:
        return Config.model_validate(_without_empty_sections(settings))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def validate_rest(settings: Mapping[Any, Any]) -> tuple[Config, set[str], list[Violation]]:
    """Make a `Config` of settings that `validate` refuses, without what is wrong with them.

    Unknown keys are dropped, and invalid values replaced by the default, or by a placeholder where there is none.

    Returns:
        The configuration, the dotted paths of the fields whose intended value is not known (of those that an unknown
        key resembles, too), and violations that only appear once the others are gone.
    """
    remaining = _without_empty_sections(settings)
    broken: set[str] | None = None
    later: list[Violation] = []
    while True:
        try:
            return Config.model_validate(remaining), broken or set(), later
        except ValidationError as error:
            dropped = [_drop(remaining, detail) for detail in error.errors(include_url=False)]
            if broken is None:
                broken = set().union(*dropped)
            else:
                later += _explain(error)


def field_paths(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of each field that holds a value (not of the sections)."""
    for name, field in model.model_fields.items():
        if (section := _section(field.annotation)) is not None:
            yield from field_paths(section, f"{prefix}{name}.")
        elif name == BALANCE:
            yield from (f"{BALANCE}.{inner}" for inner in balance_fields())
        else:
            yield prefix + name


def _without_empty_sections(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy the settings and their sections; one whose keys are all commented out (None) becomes an empty one.

    Keys become texts, since pydantic names those of other types in its own way.
    """
    sections: dict[Any, Any] = {}
    for name, values in ((_key(key), values) for key, values in settings.items()):
        if isinstance(values, dict):
            sections[name] = {_key(key): value for key, value in values.items()}
        else:
            sections[name] = {} if values is None and name in Config.model_fields else values
    return sections


def _key(key: Any) -> str:
    return key if isinstance(key, str) else shown(key).strip('"')


def _explain(error: ValidationError) -> list[Violation]:
    """Return the violations behind a validation error of `Config`, one for each key.

    pydantic reports a value that fits none of several types once for each; they become one violation.
    """
    violations: dict[str, Violation] = {}
    for detail in error.errors(include_url=False):
        for violation in _violations(detail):
            earlier = violations.get(violation.key)
            if earlier is not None and violation.rule != earlier.rule:
                violation = earlier._replace(rule=_either(earlier.rule, violation.rule))
            violations[violation.key] = violation
    return list(violations.values())


def _either(first: str, second: str) -> str:
    """Join the rules of two types of which a value should have one; a whole number is a number, too."""
    if (first, second) == (INT, FLOAT):
        return second
    return f"{first} or {second.removeprefix('should be ')}"


def _violations(detail: ErrorDetails) -> list[Violation]:
    section, path, rest = _follow(_location(detail))
    if detail["type"] == BROKEN_RULES:
        return list(detail["ctx"]["violations"])
    if detail["type"] in UNKNOWN_KEY:
        return [_unknown(section, path, rest, detail["input"])]
    field = section.model_fields.get(str(path[-1])) if path else None
    if detail["type"] == "missing" and field is not None and not rest:
        return [Violation(_dotted(path), ABSENT, "is missing", f"give {field.description}")]
    if detail["type"] == "missing" and field is not None and rest:
        return [Violation(_dotted(path), detail["input"], "has too few values", f"give {field.description}")]
    key = _dotted([*path, *(part for part in rest if isinstance(part, int))])
    if detail["type"].startswith("union_tag") and isinstance(detail["input"], Mapping):
        names = listed(f"'{name}'" for name in POLICIES)
        remedy = f"give {balance_fields()['policy'].description}"
        return [Violation(f"{key}.policy", detail["input"].get("policy"), f"should be {names}", remedy)]
    if field is not None and (_section(field.annotation) is not None or key == BALANCE):
        return [Violation(key, detail["input"], "is not a mapping", "write its keys below it")]
    # A value in place of a section in a list is explained by the field that holds the list.
    named = section.model_fields.get(next((part for part in reversed(path) if isinstance(part, str)), ""))
    remedy = _remedy(str(named.description)) if named is not None else "write a mapping of its keys"
    return [Violation(key, detail["input"], rule_of(detail), remedy)]


def _remedy(description: str) -> str:
    """Return what to do about a wrong value of a field with this description."""
    return f"say {description}" if description.startswith("whether ") else f"give {description}"


def _unknown(section: type[BaseModel], path: list[int | str], rest: list[int | str], value: Any) -> Violation:
    where, name = _dotted(path), str(rest[0])
    if where == BALANCE and (owners := policies_with(name)):
        rule = f"has no meaning with balance.policy={section.model_fields['policy'].default}"
        return Violation(f"{where}.{name}", value, rule, f"leave it out, or use balance.policy={listed(owners)}")
    rule = f"is not a key of {where}" if where else "is not a section"
    if similar := _similar_keys(section, path, str(rest[0])):
        remedy = f"did you mean {listed(similar)}?"
    else:
        remedy = f"the {'known keys' if where else 'sections'} are {listed(section.model_fields, last='and')}"
    return Violation(_dotted([*path, rest[0]]), value, rule, remedy)


def _similar_keys(section: type[BaseModel], path: list[int | str], name: str) -> list[str]:
    """Return what an unknown key may have been meant for: one spelled like it here, or a namesake elsewhere.

    Of a key that is in no section, one spelled much like it elsewhere, too.
    """
    close = nearest(name, section.model_fields)
    if close is not None:
        return [_dotted([*path, close])]
    names = {known: known.rpartition(".")[2] for known in field_paths()}
    namesake = name if path or name in names.values() else nearest(name, names.values(), CLOSE)
    return [known for known, last in names.items() if last == namesake]


def _drop(settings: dict[Any, Any], detail: ErrorDetails) -> set[str]:
    """Remove from the settings what an error is about -> the fields whose intended value is not known."""
    section, path, rest = _follow(_location(detail))
    similar: set[str] = set()
    if detail["type"] in UNKNOWN_KEY:
        similar = set(_similar_keys(section, path, str(rest[0])))
        if len(path) < 2:
            values = settings[path[0]] if path else settings
            # pydantic gives a key that is not a text as its text.
            for name in [name for name in values if str(name) == str(rest[0])]:
                del values[name]
            return similar
    name, *below = map(str, path[:2])
    placeholders = PLACEHOLDERS.get(name, {})
    if not below:
        settings[name] = dict(placeholders)
    else:
        settings[name].pop(below[0], None)
        settings[name] |= {key: value for key, value in placeholders.items() if key == below[0]}
    return {_dotted(path[:2]), *similar}


def _location(detail: ErrorDetails) -> tuple[int | str, ...]:
    """The location of an error; the last part of that of an unknown key is a text, also where the key is a number."""
    *path, last = detail["loc"]
    return (*path, str(last) if detail["type"] in UNKNOWN_KEY else last)


def _follow(location: tuple[int | str, ...]) -> tuple[type[BaseModel], list[int | str], list[int | str]]:
    """Return the innermost section of a location, the keys down to a field of it, and what pydantic adds behind."""
    if location[0] == BALANCE and len(location) > 1:
        # The section is a union: pydantic puts the name of the policy between the section and its field.
        policy, rest = POLICIES[str(location[1])], list(location[2:])
        known = bool(rest) and rest[0] in policy.model_fields
        return policy, [BALANCE, *rest[:known]], rest[known:]
    section: type[BaseModel] = Config
    for depth, part in enumerate(location):
        if isinstance(part, int):
            continue  # an index into a list of sections
        field = section.model_fields.get(part)
        if field is None:
            return section, list(location[:depth]), list(location[depth:])
        inner = _section(field.annotation)
        if inner is None and isinstance(next(iter(location[depth + 1 :]), None), int):
            inner = next(filter(None, map(_section, get_args(field.annotation))), None)
        if inner is None:
            return section, list(location[: depth + 1]), list(location[depth + 1 :])
        if any(isinstance(later, str) for later in location[depth + 1 :]):
            section = inner
    return section, list(location), []


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _dotted(path: list[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
