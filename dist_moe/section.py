"""The base class of every validated record: a section of the configuration, a policy, a file of a checkpoint."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, and strict: no unknown key, no text for a number, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
