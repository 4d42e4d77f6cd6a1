"""The base class of validated records: sections of the configuration and files of a checkpoint."""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from dist_moe.errors import Violation
from dist_moe.text import listed, shown, type_words
from dist_moe.untrusted import printable

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
"""Annotates a list of texts, so that one text is a list of one."""
BROKEN_RULES = "broken_rules"
# Type of a pydantic error -> the rule that is broken, worded to follow the value.
RULES: Mapping[str, str] = {
    "string_type": f"should be {type_words('str')}",
    "string_unicode": f"should be {type_words('str')}",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), f"should be {type_words('int')}"),
    **dict.fromkeys(("float_type", "float_parsing"), f"should be {type_words('float')}"),
    **dict.fromkeys(("bool_type", "bool_parsing"), f"should be {type_words('bool')}"),
    **dict.fromkeys(("list_type", "tuple_type"), f"should be {type_words('list')}"),
    **dict.fromkeys(("dict_type", "mapping_type"), f"should be {type_words('dict')}"),
    **dict.fromkeys(("model_type", "model_attributes_type"), f"should be {type_words('dict')}"),
    "string_pattern_mismatch": "does not have the required form",
    "string_too_short": "is empty",
    "too_short": "has too few values",
    "too_long": "has too many values",
    "extra_forbidden": "is not a known key",
    "invalid_key": "is not a known key",
    "missing": "is missing",
}


def expand_home(path: str) -> str:
    """Replace a leading `~` or `~USER` by the home folder. Raises ValueError if it is not known, or for a NUL."""
    if "\0" in path:
        raise ValueError("has a NUL character, which no path can have")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("names a home folder that is not known (write ./~ for a file of this name)")
    return expanded


UserPath = Annotated[str, Field(min_length=1), AfterValidator(expand_home)]
"""A path in the configuration, or a word in place of one. It is stored without `~`."""


class Section(BaseModel):
    """A frozen model that refuses unknown keys, text in place of a number, infinity and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def broken_rules(violations: Sequence[Violation]) -> PydanticCustomError:
    """Return the error that a validator raises to report violations in their own words."""
    text = "; ".join(str(violation) for violation in violations)
    return PydanticCustomError(BROKEN_RULES, "{text}", {"text": text, "violations": list(violations)})


def rule_of(detail: ErrorDetails) -> str:
    """Return the rule behind an error of pydantic in plain words, without the names of types of Python."""
    if detail["type"] == "too_short" and not detail["input"]:
        return "is empty"
    return RULES.get(detail["type"]) or detail["msg"].removeprefix("Input ").removeprefix("Value error, ")


def broken_fields(error: ValidationError, most: int = 3) -> str:
    """Return what is wrong with the fields of a record in a file, as in `step=1.5 should be a whole number`."""
    found = []
    for detail in error.errors(include_url=False)[:most]:
        field = ".".join(map(str, detail["loc"]))
        given = "" if detail["type"] in ("missing", "extra_forbidden") else f"={shown(detail['input'])}"
        found.append(printable(f"{field}{given} {rule_of(detail)}"))
    more = error.error_count() - len(found)
    return listed([*found, f"{more} more"] if more > 0 else found, last="and")
