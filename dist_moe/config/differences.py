"""Which values of a configuration differ from those of another one, or from the defaults."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from dist_moe.config.schema import Config
from dist_moe.errors import ABSENT
from dist_moe.policies.registry import DEFAULT, POLICIES


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each value that differs below mappings: its dotted key, its value in `one` and in `other`.

    A value that is missing is ABSENT.
    """
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        if one != other:
            yield path, one, other
        return
    for key in [*one, *(key for key in other if key not in one)]:
        yield from differences(one.get(key, ABSENT), other.get(key, ABSENT), f"{path}.{key}" if path else str(key))


def set_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a complete configuration that differ from the defaults, by dotted key.

    Args:
        config: Plain values by section, as run.json and config.yaml have them; not validated. A mapping that has no
            default, such as model.config, is returned key by key.
    """
    balance = config.get("balance")
    return {
        key: value
        for section, given in config.items()
        for key, value, _ in differences(given, default_values(section, balance), str(section))
        if value is not ABSENT
    }


def default_values(section: str, balance: Any = None) -> dict[str, Any]:
    """Return the defaults of a section by field, as JSON has them; fields that must be given are left out.

    Args:
        section: The key of the section. An unknown one has no defaults.
        balance: The section `balance`, whose policy decides what its fields are.
    """
    model = _section_model(section, balance)
    fields = {} if model is None else model.model_fields
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    if section == "balance":
        defaults["policy"] = DEFAULT.name()
    return {name: to_jsonable_python(value) for name, value in defaults.items() if value is not PydanticUndefined}


def _section_model(section: str, balance: Any) -> type[BaseModel] | None:
    if section == "balance":
        policy = balance.get("policy") if isinstance(balance, Mapping) else None
        return POLICIES.get(policy, DEFAULT) if isinstance(policy, str) else DEFAULT
    field = Config.model_fields.get(section)
    annotation = None if field is None else field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
