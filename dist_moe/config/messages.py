"""pydantic's errors told in our words: the key as it is written, the rule, and what to do."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dist_moe.config.schema import Config
from dist_moe.config.sections.balance import balance_fields
from dist_moe.errors import ABSENT, Violation
from dist_moe.policies.registry import POLICIES, policies_with
from dist_moe.text import listed, nearest

BALANCE = "balance"


def explain(error: ValidationError, settings: Mapping[Any, Any]) -> list[Violation]:
    """The violations behind a validation error of `Config`, one for each key.

    A value that fits none of several types gives several errors of pydantic's; they become one violation.
    """
    violations: dict[str, Violation] = {}
    for detail in error.errors(include_url=False):
        for violation in _violations(detail, settings):
            earlier = violations.get(violation.key)
            if earlier is not None and violation.rule != earlier.rule:
                rule = violation.rule.removeprefix("should be ")
                violation = earlier._replace(rule=f"{earlier.rule} or {rule}")
            violations[violation.key] = violation
    return list(violations.values())


def field_paths(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The dotted path of each field that holds a value (not of the sections)."""
    for name, field in model.model_fields.items():
        if (section := _section(field.annotation)) is not None:
            yield from field_paths(section, f"{prefix}{name}.")
        elif name == BALANCE:
            yield from (f"{BALANCE}.{inner}" for inner in balance_fields())
        else:
            yield prefix + name


def _violations(detail: ErrorDetails, settings: Mapping[Any, Any]) -> list[Violation]:
    section, path, rest = _follow(detail["loc"])
    key = ".".join(str(part) for part in path)
    match detail["type"]:
        case "union_tag_invalid" | "union_tag_not_found" if isinstance(detail["input"], Mapping):
            names = listed(f"'{name}'" for name in POLICIES)
            remedy = f"give {balance_fields()['policy'].description}"
            return [Violation(f"{key}.policy", detail["input"].get("policy"), f"should be {names}", remedy)]
        case "owned_keys":
            return list(detail["ctx"]["violations"])
        case "extra_forbidden" | "invalid_key":
            return [_unknown(section, path, rest, detail["input"])]
        case "missing":
            description = section.model_fields[str(path[-1])].description
            return [Violation(key, ABSENT, "is missing", f"give {description}")]
    key += "".join(f"[{part}]" for part in rest if isinstance(part, int))
    rule = detail["msg"].removeprefix("Input ").replace("Tuple ", "").replace("List ", "")
    field = section.model_fields.get(str(path[-1])) if path else None
    remedy = f"give {field.description}" if field is not None else "write a mapping of its keys"
    if field is not None and (_section(field.annotation) is not None or key == BALANCE):
        rule, remedy = "is not a mapping", "write its keys below it"
    return [Violation(key, detail["input"], rule, remedy)]


def _unknown(section: type[BaseModel], path: list[int | str], rest: list[int | str], value: Any) -> Violation:
    name = str(rest[0])
    where = ".".join(str(part) for part in path)
    rule = f"is not a key of {where}" if where else "is not a section"
    prefix = f"{where}." if where else ""
    if where == BALANCE and (owners := policies_with(name)):
        rule = f"has no meaning with balance.policy={section.model_fields['policy'].default}"
        return Violation(prefix + name, value, rule, f"leave it out, or use balance.policy={listed(owners)}")
    elsewhere = [known for known in field_paths() if known.rpartition(".")[2] == name]
    close = nearest(name, section.model_fields)
    if close is not None:
        remedy = f"did you mean {prefix}{close}?"
    elif elsewhere:
        remedy = f"did you mean {listed(elsewhere)}?"
    else:
        remedy = f"the known keys are {listed(section.model_fields, last='and')}"
    return Violation(prefix + name, value, rule, remedy)


def _follow(location: tuple[int | str, ...]) -> tuple[type[BaseModel], list[int | str], list[int | str]]:
    """The innermost section of a location, the keys down to a field of it, and what pydantic adds behind."""
    if location[0] == BALANCE and len(location) > 1:
        # The section is a union: pydantic puts the name of the policy between the section and its field.
        policy, rest = POLICIES[str(location[1])], list(location[2:])
        known = bool(rest) and rest[0] in policy.model_fields
        return policy, [BALANCE, *rest[:known]], rest[known:]
    section: type[BaseModel] = Config
    for depth, part in enumerate(location):
        field = section.model_fields.get(str(part))
        if field is None:
            return section, list(location[:depth]), list(location[depth:])
        inner = _section(field.annotation)
        if inner is None:
            return section, list(location[: depth + 1]), list(location[depth + 1 :])
        if depth + 1 < len(location):
            section = inner
    return section, list(location), []


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
