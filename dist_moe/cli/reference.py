"""The configuration reference: every field with its meaning, accepted values and default, written from the schema."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dist_moe.config import Config
from dist_moe.config.messages import BALANCE
from dist_moe.config.sections.balance import balance_fields
from dist_moe.config.yaml_io import render
from dist_moe.policies.registry import DEFAULT, POLICIES, foreign_defaults, policies_with
from dist_moe.text import listed

HEADING = """# Configuration reference

A run is one YAML file of these sections. A field that is left out has its default; a field without a default is
required. On the command line, `section.key=value` replaces the value of the file. `dist-moe config --reference` prints
this page as YAML, and `dist-moe config FILE` checks a file and prints it with every field filled in.
"""
WIDTH = 112
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
"""Keys of a JSON schema, and how they are written."""


class FieldEntry(NamedTuple):
    """One field of the configuration.

    Attributes:
        key: Dotted path, such as `train.steps`; `cluster.hosts[].name` is a key of each item of a list.
        meaning: What the field is, with its unit.
        accepts: The accepted types, values and range.
        default: The default, or `PydanticUndefined` for a required field.
    """

    key: str
    meaning: str
    accepts: str
    default: Any

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is PydanticUndefined


def entries(section: type[BaseModel], path: str) -> Iterator[FieldEntry]:
    """Yields the fields of one section, and those of its items where a field is a list of mappings.

    Args:
        section: A section of `Config`.
        path: The dotted path of the section, such as `train`.
    """
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        node = schema["properties"][name]
        default = field.get_default(call_default_factory=True)
        yield FieldEntry(f"{path}.{name}", sentence(field.description or ""), accepts(node), default)
        for item in _item_models(field.annotation):
            yield from entries(item, f"{path}.{name}[]")


def section_entries(name: str) -> Iterator[FieldEntry]:
    """Yields the fields of a section of `Config`; for `balance` those of all policies, which it names.

    Args:
        name: The key of the section.
    """
    if name != BALANCE:
        yield from entries(_section(Config.model_fields[name].annotation), name)
        return
    found = {entry.key: entry for policy in POLICIES.values() for entry in entries(policy, name)}
    for field, info in balance_fields().items():
        entry, owners = found[f"{name}.{field}"], policies_with(field)
        if field == "policy":
            entry = FieldEntry(entry.key, sentence(info.description or ""), " | ".join(POLICIES), DEFAULT.name())
        elif len(owners) < len(POLICIES):
            entry = entry._replace(meaning=f"With {listed(owners, last='and')}: {entry.meaning}")
        yield entry


def accepts(node: Mapping[str, Any]) -> str:
    """Returns what a node of a JSON schema accepts, such as `integer >= 1 | null`."""
    if "anyOf" in node:
        return " | ".join(dict.fromkeys(accepts(branch) for branch in node["anyOf"]))
    if "const" in node or "enum" in node:
        return " | ".join(str(value) for value in node.get("enum", [node.get("const")]))
    match node.get("type"):
        case "integer" | "number" as kind:
            return ", ".join([kind, *(f"{sign} {node[key]}" for key, sign in BOUNDS.items() if key in node)])
        case "boolean":
            return "true | false"
        case "array":
            items = node.get("items") or node["prefixItems"][0]
            return f"list of {accepts(items)}"
        case "string":
            return "text"
        case "null":
            return "null"
    return "mapping"


def markdown() -> str:
    """Returns the reference as a page of the documentation: one table for each section."""
    lines = [HEADING]
    for name, field in Config.model_fields.items():
        lines += [f"## `{name}`", "", sentence(field.description or ""), "", "| key | default | accepts | meaning |"]
        lines += ["|---|---|---|---|"]
        for entry in section_entries(name):
            key = entry.key.removeprefix(f"{name}.")
            default = "required" if entry.required else f"`{_inline(entry.default)}`"
            lines.append(f"| `{key}` | {default} | {_escaped(entry.accepts)} | {_escaped(entry.meaning)} |")
        lines.append("")
    return "\n".join(lines)


def yaml_text() -> str:
    """Returns the reference as a YAML file with every field at its default, and its meaning as a comment above it."""
    lines = ["# Every field of a run with its default. A field without a value is required."]
    foreign = {f"{BALANCE}.{field}" for field in foreign_defaults(DEFAULT.name())}
    for name, field in Config.model_fields.items():
        lines += ["", *_comment(sentence(field.description or ""), ""), f"{name}:"]
        for entry in section_entries(name):
            key = entry.key.removeprefix(f"{name}.")
            if "[]" in key or entry.key in foreign:
                lines += _comment(f"{key} ({entry.accepts}): {entry.meaning}", "  ")
                continue
            lines += [*_comment(entry.meaning, "  "), *_comment(entry.accepts, "  ")]
            lines.append(f"  {key}:" if entry.required else f"  {key}: {_inline(entry.default)}")
    return "\n".join(lines) + "\n"


def sentence(description: str) -> str:
    """Returns a description of the schema, which begins small and has no period, as a sentence."""
    return f"{description[:1].upper()}{description[1:]}."


def _section(annotation: Any) -> type[BaseModel]:
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _item_models(annotation: Any) -> list[type[BaseModel]]:
    """The sections among the type arguments of a field."""
    parts = getattr(annotation, "__args__", ())
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def _inline(value: Any) -> str:
    """The value as YAML on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_inline(item) for item in value)}]"
    return render({"value": value}).removeprefix("value:").strip()


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _escaped(text: str) -> str:
    """Text for a cell of a table, where bars, stars and tags mean something else."""
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(markdown(), end="")
