"""The class of transformers for the model of a configuration."""

import importlib
import inspect
from typing import Any


def model_class(config: Any, is_encoder: bool) -> Any:
    """Return the class of a model: that of the encoder alone, or of the language model."""
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING[type(config)] if is_encoder else language_model_class(config)


def language_model_class(config: Any) -> Any:
    """Return the class: that of the auto class, or the one in the family's module that no auto class knows.

    Raises:
        ValueError: There is none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    for name, found in inspect.getmembers(module, inspect.isclass):
        if name.endswith("ForCausalLM") and getattr(found, "config_class", None) is kind:
            return found
    raise ValueError(f"transformers has no language model for a {kind.__name__} alone")
