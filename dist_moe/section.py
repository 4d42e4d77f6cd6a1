"""The base class of validated records: sections of the configuration and files of a checkpoint."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dist_moe.errors import Violation

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
"""Annotates a list of texts, so that one text is a list of one."""
BROKEN_RULES = "broken_rules"


class Section(BaseModel):
    """A frozen model that refuses unknown keys, text in place of a number, infinity and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def broken_rules(violations: Sequence[Violation]) -> PydanticCustomError:
    """Return the error that a validator raises to report violations in their own words."""
    text = "; ".join(str(violation) for violation in violations)
    return PydanticCustomError(BROKEN_RULES, "{text}", {"text": text, "violations": list(violations)})
