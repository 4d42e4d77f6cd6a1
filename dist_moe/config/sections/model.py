"""The section `model`: the Hugging Face model."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dist_moe.families.registry import FAMILIES
from dist_moe.section import Section, UserPath
from dist_moe.text import listed

if TYPE_CHECKING:
    Architecture = str
else:
    Architecture = Literal[tuple(FAMILIES)]


class ModelConfig(Section):
    """The Hugging Face model."""

    architecture: Architecture = Field(
        description=f"the model's family, Hugging Face's model_type: {listed(FAMILIES)}; with model.pretrained it "
        "may be left out"
    )
    pretrained: UserPath | None = Field(
        default=None,
        description="the folder of a Hugging Face model of this family, whose weights the run starts from, or null "
        "(random initial weights)",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="the keys of the family's Hugging Face config class; a key left out is that of model.pretrained or "
        "the default of the class, and vocab_size comes from the tokenizer",
    )
