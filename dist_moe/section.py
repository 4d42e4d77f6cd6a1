"""The base class of validated records: sections of the configuration and files of a checkpoint."""

import os
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dist_moe.errors import Violation

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
"""Annotates a list of texts, so that one text is a list of one."""
BROKEN_RULES = "broken_rules"


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
