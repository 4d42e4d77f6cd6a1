"""The class of transformers for the model of a configuration."""

import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar


def model_class(config: Any, is_encoder: bool) -> Any:
    """Return the class of a model: that of the encoder alone, or of the language model.

    Raises:
        ValueError: There is no language model, and none can be made.
    """
    return find_model_class(config, is_encoder) or language_model_class(config)


def find_model_class(config: Any, is_encoder: bool) -> Any:
    """Return the class of transformers for a model alone, as `model_class`; None if a language model has none."""
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING[type(config)] if is_encoder else find_language_model_class(config)


def language_model_class(config: Any) -> Any:
    """Return the class: that of the auto class, or the one in the family's module that no auto class knows.

    Of a text model that transformers has only as a part of another model, it is made here: the text model and an
    output layer, with the names that other families have.

    Raises:
        ValueError: There is neither a language model nor a text model.
    """
    kind: Any = type(config)
    return find_language_model_class(config) or _with_output_layer(kind)


def find_language_model_class(config: Any) -> Any:
    """Return the class of transformers for the language model alone; None if there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    return next((found for found in _classes_of(kind) if found.__name__.endswith("ForCausalLM")), None)


def is_part(architecture: str) -> bool:
    """Whether transformers has this language model only as a part of another model."""
    from transformers import CONFIG_MAPPING

    return find_language_model_class(CONFIG_MAPPING[architecture]()) is None


def text_model_class(kind: Any) -> Any:
    """Return the class of the text model without an output layer, of a config class.

    Raises:
        ValueError: There is none.
    """
    from transformers import MODEL_MAPPING

    if kind in MODEL_MAPPING:
        return MODEL_MAPPING[kind]
    for found in _classes_of(kind):
        if found.__name__.endswith("Model") and "forward" in vars(found):
            return found
    raise ValueError(f"transformers has no text model for a {kind.__name__}")


def _classes_of(kind: Any) -> Iterator[Any]:
    """Yield the classes of models in the family's module that have this config class."""
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    for _, found in inspect.getmembers(module, inspect.isclass):
        if getattr(found, "config_class", None) is kind:
            yield found


@functools.cache
def _with_output_layer(kind: Any) -> Any:
    """Make the class of a text model with an output layer, of a config class."""
    from torch import nn
    from transformers import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    text_model = text_model_class(kind)
    base: Any = text_model.__bases__[0]  # what the family's models share: initial values, and kinds of attention

    class LanguageModel(base, GenerationMixin):
        """A text model with an output layer, called as the language models of transformers are."""

        config_class = kind
        base_model_prefix = "model"
        _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = text_model(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, labels: Any = None, logits_to_keep: int = 0, **arguments: Any) -> Any:
            """Return the logits of the last `logits_to_keep` positions, or of all, and with labels the loss."""
            outputs = self.model(input_ids=input_ids, **arguments)
            logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep or None :])
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **arguments)
            return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    LanguageModel.__name__ = LanguageModel.__qualname__ = f"{text_model.__name__}ForCausalLM"
    LanguageModel.__module__ = text_model.__module__  # where transformers looks for what the class supports
    return LanguageModel
