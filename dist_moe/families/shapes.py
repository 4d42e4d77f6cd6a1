"""Rules on the shape of a model that several families share."""

from typing import Any

from dist_moe.errors import Violation
from dist_moe.text import counted, divisors, listed, up_to


def rotary_violations(key: str, width: Any) -> list[Violation]:
    """Rotary position embeddings rotate the elements of a head in pairs."""
    if type(width) is not int:  # a key that the config class does not declare may have any type
        return [Violation(f"model.config.{key}", width, "is not an integer", "give an even number, or leave it out")]
    if width >= 2 and width % 2 == 0:
        return []
    rule = "cannot be rotated, since rotary embeddings take its elements in pairs"
    return [Violation(f"model.config.{key}", width, rule, "give an even number")]


def grouped_query_violations(settings: Any) -> list[Violation]:
    """Grouped-query attention: the key-value heads divide the attention heads, each with rotary embeddings."""
    heads, shared = settings.num_attention_heads, settings.num_key_value_heads
    head_dim = getattr(settings, "head_dim", None)
    violations = []
    if heads % shared:
        rule = f"does not divide the {heads} attention heads"
        remedy = f"use {listed(divisors(heads))}"
        violations.append(Violation("model.config.num_key_value_heads", shared, rule, remedy))
    return violations + rotary_violations("head_dim", settings.hidden_size // heads if head_dim is None else head_dim)


def sparse_step_layers(settings: Any) -> list[int]:
    """Every `decoder_sparse_step`-th layer is an MoE layer, except those of `mlp_only_layers`."""
    sparse = [layer for layer in range(settings.num_hidden_layers) if (layer + 1) % settings.decoder_sparse_step == 0]
    return [layer for layer in sparse if layer not in settings.mlp_only_layers]


def sparse_step_remedy(settings: Any) -> tuple[str, str]:
    """What to do where `sparse_step_layers` leaves no MoE layer."""
    depth = settings.num_hidden_layers
    return "mlp_only_layers", f"remove a layer from it, with decoder_sparse_step at most {depth}"


def sparse_step_violations(settings: Any) -> list[Violation]:
    """`mlp_only_layers` names layers that the model has."""
    depth, named = settings.num_hidden_layers, settings.mlp_only_layers
    if all(0 <= layer < depth for layer in named):
        return []
    rule = f"names a layer that is not among the {counted(depth, 'layer')}"
    return [
        Violation("model.config.mlp_only_layers", named, rule, f"give numbers of layers, {up_to(depth - 1, first=0)}")
    ]
