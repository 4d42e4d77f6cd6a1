"""What the Hugging Face config classes accept although the model cannot run with it."""

from typing import Any

from dist_moe.config.schema import Config
from dist_moe.errors import Violation
from dist_moe.families.registry import family_of

POSITIVE_EVERYWHERE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
ROW_BYTES = 16  # torch.nn.functional.grouped_mm takes rows that start at multiples of this


def shape_violations(config: Config, settings: Any) -> list[Violation]:
    """What is wrong with the shape of a model.

    Each rule is one that the family's modeling code needs and its config class does not check.

    Args:
        config: the configuration.
        settings: the Hugging Face config built from it.
    """
    family = family_of(config.model.architecture)
    violations = []
    for key in (*POSITIVE_EVERYWHERE, *family.positive_keys):
        value = getattr(settings, key)
        if value is None or value < 1:
            violations.append(Violation(f"model.config.{key}", value, "is not positive", "give 1 or more"))
    if violations:
        return violations  # the rules below divide by these
    violations += family.shape_violations(settings)
    if not family.moe_layers(settings):
        key, remedy = family.layers_remedy(settings)
        rule = f"leaves no MoE layer among the {settings.num_hidden_layers} layers"
        violations.append(Violation(f"model.config.{key}", getattr(settings, key), rule, remedy))
    return [*violations, *_widths(config, settings), *_length(config, settings)]


def _widths(config: Config, settings: Any) -> list[Violation]:
    from transformers.activations import ACT2FN

    violations = []
    multiple = ROW_BYTES // (4 if config.train.precision == "fp32" else 2)
    for key in ("hidden_size", "moe_intermediate_size"):
        if (width := getattr(settings, key)) % multiple:
            rule = f"is not a multiple of {multiple} (rows of experts start every {ROW_BYTES} bytes)"
            near = multiple * max(1, round(width / multiple))
            violations.append(Violation(f"model.config.{key}", width, rule, f"give for example {near}"))
    if settings.hidden_act not in ACT2FN:
        rule = "is not an activation of transformers"
        violations.append(Violation("model.config.hidden_act", settings.hidden_act, rule, "use silu"))
    return violations


def _length(config: Config, settings: Any) -> list[Violation]:
    longest = settings.max_position_embeddings
    if config.data.sequence_length <= longest:
        return []
    rule = f"is longer than the model's {longest} positions"
    remedy = "shorten it, or raise model.config.max_position_embeddings"
    return [Violation("data.sequence_length", config.data.sequence_length, rule, remedy)]
