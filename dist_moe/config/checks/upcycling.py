"""What model.upcycle_* make of a dense model: its MoE layers and experts, and what is wrong with the fields."""

from collections.abc import Mapping
from typing import Any

from dist_moe.config.pretrained import weights_source
from dist_moe.config.schema import Config
from dist_moe.config.sections.model import ModelConfig
from dist_moe.errors import Violation
from dist_moe.families.dense import EXPERTS_KEY, LAYERS_KEY, TOP_K_KEY
from dist_moe.families.record import Family
from dist_moe.text import counted, listed, shown, up_to

DEFAULT_TOP_K = 2
PREFIX = "upcycle_"


def chosen_layers(model: ModelConfig, depth: int) -> list[int]:
    """Return the indices of the layers of `depth` that become MoE layers."""
    if model.upcycle_layers is not None:
        return sorted(model.upcycle_layers)
    return [layer for layer in range(depth) if (depth - 1 - layer) % model.upcycle_every == 0]


def upcycled_arguments(config: Config, depth: Any) -> dict[str, Any]:
    """Return the keys that an upcycled model's config has besides those of the dense one.

    Args:
        config: With `model.upcycle_from`.
        depth: The number of layers of the dense model.
    """
    experts = config.model.upcycle_experts
    layers = chosen_layers(config.model, depth) if type(depth) is int and depth > 0 else []
    top_k = config.router.top_k or min(DEFAULT_TOP_K, experts)
    return {EXPERTS_KEY: experts, TOP_K_KEY: top_k, LAYERS_KEY: layers}


def upcycling_violations(config: Config, family: Family, arguments: Mapping[str, Any]) -> list[Violation]:
    """What is wrong with `model` where it is made of a dense model, or looks so.

    Args:
        config: The configuration.
        family: That of model.architecture.
        arguments: Keyword arguments of the Hugging Face config class, those of the dense model included.
    """
    model = config.model
    if model.upcycle_from is None:
        return _without_source(model, family)
    violations = []
    if model.pretrained is not None:
        rule, remedy = f"starts the run from other weights than model.upcycle_from={model.upcycle_from}", "set one"
        violations.append(Violation("model.pretrained", model.pretrained, rule, f"{remedy} of the two"))
    for key in family.undeclared_keys if family.feed_forward is not None else ():
        if key in model.config:
            remedy = "use router.top_k" if key == TOP_K_KEY else "use model.upcycle_experts and model.upcycle_layers"
            violations.append(Violation(f"model.config.{key}", model.config[key], "is not set here", remedy))
    return [*violations, *_layer_violations(model, arguments.get("num_hidden_layers"))]


def _without_source(model: ModelConfig, family: Family) -> list[Violation]:
    """What is wrong where there is no dense model."""
    fields = type(model).model_fields
    changed = [name for name in fields if name.startswith(PREFIX) and getattr(model, name) != fields[name].default]
    violations = [
        Violation(f"model.{name}", getattr(model, name), "has no effect without model.upcycle_from", "leave it out")
        for name in changed
    ]
    if family.feed_forward is not None and weights_source(model).value is None:
        rule = "is the architecture of a dense model, which has no experts"
        remedy = "set model.upcycle_from to the folder of one, or use the architecture of an MoE model"
        violations.append(Violation("model.architecture", model.architecture, rule, remedy))
    return violations


def _layer_violations(model: ModelConfig, depth: Any) -> list[Violation]:
    violations = []
    every, named = model.upcycle_every, model.upcycle_layers
    if named is not None and every != type(model).model_fields["upcycle_every"].default:
        rule = f"has no effect with model.upcycle_layers={shown(named)}"
        violations.append(Violation("model.upcycle_every", every, rule, "set one of the two"))
    if type(depth) is not int or depth < 1:
        return violations  # the folder is refused
    if named is None and every > depth:
        rule = f"is more than the {counted(depth, 'layer')} of the model"
        violations.append(Violation("model.upcycle_every", every, rule, f"use {up_to(depth)}"))
    if named is not None and (beyond := [layer for layer in named if layer >= depth]):
        rule = f"names {listed(beyond, last='and')}, and the model has {counted(depth, 'layer')}"
        violations.append(Violation("model.upcycle_layers", named, rule, f"use indices {up_to(depth - 1, first=0)}"))
    if named is not None and len(set(named)) < len(named):
        violations.append(Violation("model.upcycle_layers", named, "names a layer twice", "name each once"))
    return violations
