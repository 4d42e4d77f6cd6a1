"""The fields of the Hugging Face model."""

from typing import Any

from pydantic import Field

from dist_moe.config.family import Architecture
from dist_moe.section import Section


class ModelConfig(Section):
    """The Hugging Face model."""

    architecture: Architecture = Field(
        description="the model's family, Hugging Face's model_type: deepseek_v3 or qwen3_moe"
    )
    pretrained: str | None = Field(
        default=None,
        min_length=1,
        description="the folder of a Hugging Face model of this family, with whose weights the run begins, or null "
        "(the weights begin at random)",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="the keys of the family's Hugging Face config class; a key left out is as in model.pretrained, or "
        "else keeps the default of that class, and vocab_size comes from the tokenizer",
    )
