"""What the Hugging Face config classes accept although the model cannot run with it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_moe.config.schema import Config
from dist_moe.errors import Violation
from dist_moe.families.registry import family_of
from dist_moe.text import counted, shown, up_to

POSITIVE_EVERYWHERE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Key -> whether a value is in range, and the range.
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "initializer_range": (lambda value: 0 < value < math.inf, "above 0"),
    "rms_norm_eps": (lambda value: 0 < value < math.inf, "above 0"),
    "attention_dropout": (lambda value: 0 <= value < 1, "0 to below 1"),
    "hidden_dropout_prob": (lambda value: 0 <= value < 1, "0 to below 1"),
    "attention_probs_dropout_prob": (lambda value: 0 <= value < 1, "0 to below 1"),
    "layer_norm_eps": (lambda value: 0 < value < math.inf, "above 0"),
}
# Key -> the largest value, for those whose integers may be larger, or have to be smaller, than the others'. Each bound
# is beyond any model that exists, and keeps the time of the check below seconds.
LARGEST: Mapping[str, int] = {
    "vocab_size": 100_000_000,
    "num_hidden_layers": 10_000,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}
LARGEST_SIZE = 1_000_000
ROW_BYTES = 16  # torch.nn.functional.grouped_mm takes rows that start at multiples of this


def shape_violations(config: Config, settings: Any) -> list[Violation]:
    """What is wrong with the shape of a model.

    Each rule is one that the family's modeling code needs and its config class does not check.

    Args:
        config: The configuration.
        settings: The Hugging Face config built from it.
    """
    family = family_of(config.model.architecture)
    violations = _ranges(settings)
    sizes = len(violations)
    for key in (*POSITIVE_EVERYWHERE, *family.positive_keys):
        if family.feed_forward is not None and key == "moe_intermediate_size":
            continue  # its experts have the intermediate_size
        if family.is_probed and not isinstance(getattr(settings, key, None), int):
            continue  # not all families have it, or one for all layers
        value = getattr(settings, key)
        if value is None or value < 1:
            violations.append(Violation(f"model.config.{key}", value, "is not positive", "give 1 or more"))
    if len(violations) > sizes:
        return violations  # the rules below divide by these
    violations += family.shape_violations(settings)
    if not family.moe_layers(settings):
        key, remedy = family.layers_remedy(settings)
        rule = f"leaves no MoE layer among the {counted(settings.num_hidden_layers, 'layer')}"
        violations.append(Violation(f"model.config.{key}", getattr(settings, key), rule, remedy))
    violations += _frozen(config, family.moe_layers(settings))
    return [*violations, *_widths(config, settings), *_length(config, settings)]


def size_violations(arguments: Mapping[str, Any]) -> list[Violation]:
    """Which integers are larger than those of any model: building it would take minutes, even without memory."""
    return [
        Violation(f"model.config.{key}", value, f"is above {largest:,}", "give a smaller number")
        for key, value in arguments.items()
        if type(value) is int and value > (largest := _largest(key))
    ]


def _largest(key: str) -> int:
    return LARGEST.get("vocab_size" if "vocab" in key else key, LARGEST_SIZE)


def unsupported_violations(
    config: Config, settings: Any, own: Mapping[str, Any], stated: Mapping[str, Any]
) -> list[Violation]:
    """What asks for something that is not built, or has no effect.

    Args:
        config: The configuration.
        settings: The Hugging Face config built from it.
        own: The keys of model.config.
        stated: The keys of model.pretrained, which need not be asked for.
    """
    family, default = family_of(config.model.architecture), type(settings)()
    violations = []
    for key, (accepted, rule) in family.unsupported_keys.items():
        if key in own and own[key] not in accepted and own[key] != stated.get(key):
            remedy = f"set it to {shown(accepted[-1])}, or leave it out"
            violations.append(Violation(f"model.config.{key}", own[key], rule, remedy))
    for key, switch in family.switched_keys.items():
        unused = (None, getattr(default, key), type(settings).__dataclass_fields__[key].default, stated.get(key))
        if key in own and not getattr(settings, switch) and own[key] not in unused:
            rule, remedy = f"has no effect while model.config.{switch} is false", f"leave it out, or set {switch}: true"
            violations.append(Violation(f"model.config.{key}", own[key], rule, remedy))
    return violations


def unsupported_notices(config: Config, own: Mapping[str, Any], stated: Mapping[str, Any]) -> tuple[str, ...]:
    """What model.pretrained has that is not built; arguments are those of `unsupported_violations`."""
    unsupported = family_of(config.model.architecture).unsupported_keys
    return tuple(
        f"model.pretrained has {key}={shown(stated[key])}, which {rule}; its other weights are used"
        for key, (accepted, rule) in unsupported.items()
        if key in stated and key not in own and stated[key] not in accepted
    )


def _ranges(settings: Any) -> list[Violation]:
    return [
        Violation(f"model.config.{key}", value, f"is not in the range {words}", f"give a number ({words})")
        for key, (fits, words) in RANGES.items()
        if (value := getattr(settings, key, None)) is not None and not fits(value)
    ]


def _frozen(config: Config, moe_layers: Sequence[int]) -> list[Violation]:
    frozen = config.train.frozen_layers
    if not moe_layers or frozen <= max(moe_layers):
        return []
    rule = f"leaves no MoE layer to train: the last one is layer {max(moe_layers)}, counted from 0"
    return [Violation("train.frozen_layers", frozen, rule, f"use {up_to(max(moe_layers), first=0)}")]


def _widths(config: Config, settings: Any) -> list[Violation]:
    from transformers.activations import ACT2FN

    violations = []
    multiple = ROW_BYTES // (4 if config.train.precision == "fp32" else 2)
    dense = family_of(config.model.architecture).feed_forward is not None
    for key in ("hidden_size", "intermediate_size" if dense else "moe_intermediate_size"):
        width = getattr(settings, key, None)
        if isinstance(width, int) and width % multiple:
            rule = f"is not a multiple of {multiple} (rows of experts start every {ROW_BYTES} bytes)"
            near = multiple * max(1, round(width / multiple))
            violations.append(Violation(f"model.config.{key}", width, rule, f"give for example {near}"))
    activation = getattr(settings, "hidden_act", "silu")
    if activation not in ACT2FN:
        rule = "is not an activation of transformers"
        violations.append(Violation("model.config.hidden_act", activation, rule, "use silu"))
    return violations


def _length(config: Config, settings: Any) -> list[Violation]:
    longest = getattr(settings, "max_position_embeddings", None)
    if longest is None or config.data.sequence_length <= longest:
        return []
    rule = f"is longer than the model's {longest} positions"
    remedy = "shorten it, or raise model.config.max_position_embeddings"
    return [Violation("data.sequence_length", config.data.sequence_length, rule, remedy)]
