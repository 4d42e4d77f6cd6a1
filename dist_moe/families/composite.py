"""Multimodal models, which transformers composes of several models: one of them is a language model.

That one is trained alone; where it is in the multimodal model is found by program.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dist_moe.families.model_class import text_model_class

PART_KEYS = ("text_config", "thinker_config", "language_config", "llm_config")
"""Keys under which the config.json of a multimodal model has its language model."""
DEPTH_KEYS = ("depth", "layers")
"""What the keys with a number of layers end with."""
MOST_LAYERS = 1000


class Composite(NamedTuple):
    """Where a multimodal model has its language model.

    Attributes:
        model: The multimodal model, on the meta device.
        base: The name of the text model in it.
        head: The name of its output layer.
    """

    model: Any
    base: str
    head: str

    def name_of(self, name: str) -> str:
        """Return the name in the multimodal model of a tensor of the language model: `model.*` or `lm_head.*`."""
        part, _, rest = name.partition(".")
        return f"{self.base if part == 'model' else self.head}.{rest}"


def language_model_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json as that of a language model: of a multimodal model, that of the one in it.

    Raises:
        ValueError: The config class refuses the content.
    """
    config = composite_config(raw)
    if config is None:
        return dict(raw)
    text = config.get_text_config()
    settings: dict[str, Any] = {**text.to_diff_dict(), "model_type": text.model_type}
    owner = _owner_of(config, text)
    settings["tie_word_embeddings"] = (owner or config).tie_word_embeddings  # its class reads its own
    return settings | {key: raw[key] for key in ("quantization_config",) if key in raw}


def is_composite(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a multimodal model that transformers has. Raises ValueError."""
    return composite_config(raw) is not None


def composite_config(raw: Mapping[str, Any]) -> Any:
    """Return the configuration of a multimodal model; None where the config.json is not that of one.

    Raises:
        ValueError: The config class refuses the content.
    """
    if not any(isinstance(raw.get(key), dict) for key in PART_KEYS):
        return None
    from transformers import CONFIG_MAPPING, PretrainedConfig

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    kind: Any = CONFIG_MAPPING[model_type]
    if not kind.sub_configs:
        return None
    values = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        config = kind.from_dict(PretrainedConfig._decode_special_floats(values))
        text = config.get_text_config()
    except Exception as error:  # the class of another library may raise anything
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{kind.__name__} refuses it: {type(error).__name__}: {reason}") from None
    return config if isinstance(text, PretrainedConfig) and text is not config else None


def _owner_of(config: Any, text: Any) -> Any:
    """Return the configuration, or the part of it, that has this language model as a part; None if none has."""
    parts = [part for name in config.sub_configs if (part := getattr(config, name)) is not None]
    if any(part is text for part in parts):
        return config
    return next((owner for part in parts if (owner := _owner_of(part, text)) is not None), None)


def composite_class(config: Any) -> Any:
    """Return the class of a multimodal model, which has an output layer for text.

    Raises:
        ValueError: transformers has none.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(f"transformers has no model with an output layer for a {type(config).__name__}")


def find_composite(raw: Mapping[str, Any]) -> Composite:
    """Find the language model in the multimodal model of a config.json.

    Raises:
        ValueError: The model cannot be built, or it has no language model whose names are known.
    """
    return _find_composite(json.dumps(raw, sort_keys=True))


@functools.lru_cache(maxsize=2)
def _find_composite(raw_json: str) -> Composite:
    import torch

    raw = json.loads(raw_json)
    _check_depths(raw)
    config = composite_config(raw)
    kind, text_kind = composite_class(config), text_model_class(type(config.get_text_config()))
    try:
        with torch.device("meta"):
            model = kind._from_config(config)
    except Exception as error:  # the class of another library may raise anything
        raise ValueError(f"no {kind.__name__} can be built: {type(error).__name__}: {error}") from None
    modules = dict(model.named_modules())
    base = next((name for name, module in modules.items() if type(module) is text_kind), None)
    if base is not None:
        parents = base.split(".")
        heads = (".".join([*parents[:depth], "lm_head"]) for depth in range(len(parents) - 1, -1, -1))
        head = next((name for name in heads if name in modules), None)
        if head is not None:
            return Composite(model, base, head)
    raise ValueError(f"a {kind.__name__} has no {text_kind.__name__} with an output layer")


def _check_depths(raw: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError where a part has more layers than a model has: they take memory on the meta device, too."""
    for key, value in raw.items():
        if isinstance(value, dict):
            _check_depths(value, f"{prefix}{key}.")
        elif isinstance(value, int) and key.endswith(DEPTH_KEYS) and value > MOST_LAYERS:
            raise ValueError(f"{prefix}{key}={value} is more than the {MOST_LAYERS} layers that a model may have")
