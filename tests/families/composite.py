"""Small multimodal models, whose language model is that of a family."""

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from dist_moe.families.composite import composite_class
from tests.families.small import WIDTH, small_config

UNDECLARED = {
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 16},
}
"""What the code of a part reads although its config class has no default."""
DEPTH, HEADS, PLACES = 2, 2, 64
SAME = ("image_size", "patch_size", "merge_size", "kernel_size", "chunk_size")
"""Sizes that others depend on."""


def small_composite(family: str, **changes: Any) -> PreTrainedConfig | None:
    """Return the configuration of the small multimodal model of a family; None where it has none.

    Args:
        family: Its model_type.
        changes: Values of keys of the language model, in place of the small ones.
    """
    if family not in CONFIG_MAPPING or not CONFIG_MAPPING[family].sub_configs:
        return None
    text = small_config(family, **changes)
    config = CONFIG_MAPPING[family]()
    if type(config.get_text_config()) is not type(text):
        return None
    tied = getattr(text, "tie_word_embeddings", False)
    kind: Any = type(config)
    whole: PreTrainedConfig = kind(**_with_text(config, text), tie_word_embeddings=tied)
    return whole


def _with_text(config: PreTrainedConfig, text: PreTrainedConfig) -> dict[str, Any]:
    """Return the parts of a configuration, small, and with this language model."""
    parts: dict[str, Any] = {}
    for name in config.sub_configs:
        part = getattr(config, name)
        if type(part) is type(text):
            parts[name] = copy.deepcopy(text.to_dict())
        elif part is not None:
            parts[name] = {**_small(part), **_with_text(part, text)}
    return parts


def _small(part: PreTrainedConfig) -> dict[str, Any]:
    values = {key: value for key, value in part.to_dict().items() if type(value) is int}
    small: dict[str, Any] = dict(UNDECLARED.get(type(part).__name__, {}))
    for key in values:
        if key in ("depth", "encoder_layers", "num_hidden_layers"):
            small[key] = DEPTH
        elif "heads" in key:
            small[key] = HEADS
        elif key == "num_position_embeddings":
            small[key] = PLACES
        elif key == "d_model" or key.endswith(("_dim", "hidden_size", "intermediate_size")):
            small[key] = WIDTH
    return small


def build_composite(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration, with random weights."""
    torch.manual_seed(0)
    model: PreTrainedModel = composite_class(config)._from_config(config)
    return model
