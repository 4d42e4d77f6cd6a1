"""Dense Hugging Face models whose feed-forward networks can become experts: encoders like BERT, decoders like Llama."""

from typing import Any

from dist_moe.errors import Violation
from dist_moe.families.record import Family, FeedForward
from dist_moe.families.shapes import grouped_query_violations
from dist_moe.text import divisors, listed

EXPERTS_KEY, TOP_K_KEY, LAYERS_KEY = "num_experts", "num_experts_per_tok", "moe_layers"
"""Keys of an upcycled model's config.json, which its config class does not declare."""

GATED = FeedForward(
    layers="layers",
    block="mlp",
    projections={name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    activation="mlp.act_fn",
    norm="post_attention_layernorm",
)
PLAIN = FeedForward(
    layers="encoder.layer",
    block="intermediate",
    projections={"up_proj": "intermediate.dense", "down_proj": "output.dense"},
    activation="intermediate.intermediate_act_fn",
    norm="attention.output.LayerNorm",
    removed=("output.dense",),
)


def moe_layers(settings: Any) -> list[int]:
    """The layers that the config names."""
    return [layer for layer in getattr(settings, LAYERS_KEY) if layer < settings.num_hidden_layers]


def layers_remedy(settings: Any) -> tuple[str, str]:
    """What to do where no layer is an MoE layer."""
    return LAYERS_KEY, f"give indices of its layers, 0 to {settings.num_hidden_layers - 1}"


def encoder_violations(settings: Any) -> list[Violation]:
    """The attention heads divide the width."""
    width, heads = settings.hidden_size, settings.num_attention_heads
    if width % heads == 0:
        return []
    rule = f"does not divide the hidden_size of {width}"
    return [Violation("model.config.num_attention_heads", heads, rule, f"use {listed(divisors(width))}")]


def _family(architecture: str, encoder: bool, **few_layers: Any) -> Family:
    """Make the record of a dense family, which differs from the others by the names in its feed-forward network."""
    refused = {"add_cross_attention": "asks for cross-attention to another model"} if encoder else {}
    refused |= {"is_decoder": "asks for causal attention"} if encoder else {}
    refused |= {} if encoder else {"mlp_bias": "asks for biases, which gated experts do not have"}
    return Family(
        architecture=architecture,
        block="UpcycledBlock",
        router="gate",
        experts="experts",
        score="softmax",
        experts_key=EXPERTS_KEY,
        top_k_key=TOP_K_KEY,
        undeclared_keys=(EXPERTS_KEY, TOP_K_KEY, LAYERS_KEY),
        positive_keys=() if encoder else ("num_key_value_heads",),
        file_keys={key: ((False, None), rule) for key, rule in refused.items()},
        few_layers={"num_hidden_layers": 2, LAYERS_KEY: [0, 1], **few_layers},
        moe_layers=moe_layers,
        layers_remedy=layers_remedy,
        shape_violations=encoder_violations if encoder else grouped_query_violations,
        feed_forward=PLAIN if encoder else GATED,
        encoder=encoder,
    )


_RECORDS = (
    _family("bert", encoder=True),
    _family("electra", encoder=True),
    _family("llama", encoder=False),
    _family("mistral", encoder=False),
    _family("qwen2", encoder=False, layer_types=None),
    _family("qwen3", encoder=False, layer_types=None),
)
DENSE: dict[str, Family] = {family.architecture: family for family in _RECORDS}
