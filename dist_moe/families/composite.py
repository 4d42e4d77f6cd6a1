"""Models of several parts, such as images and text, of which one is a language model that can be trained alone."""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dist_moe.families.model_class import text_model_class

PART_KEYS = ("text_config", "thinker_config", "language_config", "llm_config")
"""Keys under which the config.json of such a model has its language model."""


class Composite(NamedTuple):
    """Where a model has its language model.

    Attributes:
        model: The whole, on the meta device.
        base: The name of the text model in it.
        head: The name of its output layer.
    """

    model: Any
    base: str
    head: str

    def name_of(self, name: str) -> str:
        """Return the name in the whole of a tensor of the language model: `model.*` or `lm_head.*`."""
        part, _, rest = name.partition(".")
        return f"{self.base if part == 'model' else self.head}.{rest}"


def language_model_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json as that of a language model: of the one in the model, if it has other parts.

    Raises:
        ValueError: transformers does not know the model, or its config class refuses the content.
    """
    if not is_composite(raw):
        return dict(raw)
    try:
        config = whole_config(raw)
        text = config.get_text_config()
    except Exception as error:  # the class of another library may raise anything
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{raw.get('model_type')}: {type(error).__name__}: {reason}") from None
    settings: dict[str, Any] = {**text.to_diff_dict(), "model_type": text.model_type}
    settings["tie_word_embeddings"] = _owner_of(config, text).tie_word_embeddings  # its class reads its own
    return settings | {key: raw[key] for key in ("quantization_config",) if key in raw}


def _owner_of(config: Any, text: Any) -> Any:
    """Return the configuration, or the part of it, that has this language model as a part; None if none has."""
    parts = [part for name in config.sub_configs if (part := getattr(config, name)) is not None]
    if any(part is text for part in parts):
        return config
    return next((owner for part in parts if (owner := _owner_of(part, text)) is not None), None)


def is_composite(raw: Mapping[str, Any]) -> bool:
    """Whether the config.json is that of a model with other parts."""
    return any(isinstance(raw.get(key), dict) for key in PART_KEYS)


def whole_config(raw: Mapping[str, Any]) -> Any:
    """Return the configuration of a model with other parts."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    values = {key: value for key, value in raw.items() if key != "model_type"}
    return CONFIG_MAPPING[raw["model_type"]].from_dict(PretrainedConfig._decode_special_floats(values))


def whole_class(config: Any) -> Any:
    """Return the class of a model with other parts, which has an output layer for text.

    Raises:
        ValueError: transformers has none.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(f"transformers has no model with an output layer for a {type(config).__name__}")


def find_composite(raw: Mapping[str, Any]) -> Composite:
    """Find the language model in the model of a config.json with other parts.

    Raises:
        ValueError: It has no language model whose names are known.
    """
    return _find_composite(json.dumps(raw, sort_keys=True))


@functools.lru_cache(maxsize=2)
def _find_composite(raw_json: str) -> Composite:
    import torch

    config = whole_config(json.loads(raw_json))
    kind, text_kind = whole_class(config), text_model_class(type(config.get_text_config()))
    with torch.device("meta"):
        model = kind._from_config(config)
    modules = dict(model.named_modules())
    base = next((name for name, module in modules.items() if type(module) is text_kind), None)
    if base is not None:
        parents = base.split(".")
        heads = (".".join([*parents[:depth], "lm_head"]) for depth in range(len(parents) - 1, -1, -1))
        head = next((name for name in heads if name in modules), None)
        if head is not None:
            return Composite(model, base, head)
    raise ValueError(f"a {kind.__name__} has no {text_kind.__name__} with an output layer")
