"""What the Hugging Face config classes accept though the model cannot run with it."""

from typing import Any

from dist_moe.config.schema import Config
from dist_moe.errors import Violation
from dist_moe.text import divisors, listed

POSITIVE_KEYS: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("n_shared_experts", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "qwen3_moe": ("num_key_value_heads", "decoder_sparse_step"),
}
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


def moe_layers(settings: Any) -> list[int]:
    """The indices of the MoE layers of a Hugging Face config of ours; the others are dense."""
    layers = range(settings.num_hidden_layers)
    if settings.model_type == "deepseek_v3":
        return [layer for layer in layers if layer >= settings.first_k_dense_replace]
    sparse = [layer for layer in layers if (layer + 1) % settings.decoder_sparse_step == 0]
    return [layer for layer in sparse if layer not in settings.mlp_only_layers]


def shape_violations(config: Config, settings: Any) -> list[Violation]:
    """What is wrong with the shape of `settings`, the Hugging Face config made for `config`.

    Each rule is one that the family's modelling code needs and its config class does not check.
    """
    architecture = config.model.architecture
    violations = []
    for key in (*POSITIVE_EVERYWHERE, *POSITIVE_KEYS[architecture]):
        value = getattr(settings, key)
        if value is None or value < 1:
            violations.append(Violation(f"model.config.{key}", value, "is not positive", "give 1 or more"))
    if architecture == "deepseek_v3" and (first := settings.first_k_dense_replace) is None:
        rule = "does not say which layers are dense"
        violations.append(Violation("model.config.first_k_dense_replace", first, rule, "give 0 or more"))
    if violations:
        return violations  # the rules below divide by these
    return [*_attention(settings), *_layers(settings), *_widths(config, settings), *_length(config, settings)]


def _attention(settings: Any) -> list[Violation]:
    found = []
    heads, shared = settings.num_attention_heads, settings.num_key_value_heads
    if settings.model_type == "deepseek_v3":
        rotary, rotary_key = settings.qk_rope_head_dim, "qk_rope_head_dim"
        if shared != heads:
            rule = f"is not the {heads} attention heads (latent attention has as many of both)"
            found.append(Violation("model.config.num_key_value_heads", shared, rule, f"give {heads}"))
    else:
        rotary, rotary_key = getattr(settings, "head_dim", None), "head_dim"
        if rotary is None:
            rotary = settings.hidden_size // heads
        if heads % shared:
            rule = f"does not divide the {heads} attention heads"
            remedy = f"use {listed(divisors(heads))}"
            found.append(Violation("model.config.num_key_value_heads", shared, rule, remedy))
    if rotary < 2 or rotary % 2:
        rule = "cannot be rotated, which takes its elements in pairs"
        found.append(Violation(f"model.config.{rotary_key}", rotary, rule, "give an even number"))
    return found


def _layers(settings: Any) -> list[Violation]:
    if moe_layers(settings):
        return []
    depth = settings.num_hidden_layers
    if settings.model_type == "deepseek_v3":
        key, remedy = "first_k_dense_replace", f"give 0 to {depth - 1}"
    else:
        key, remedy = "mlp_only_layers", f"leave a layer out of it, with decoder_sparse_step at most {depth}"
    rule = f"leaves none of the {depth} layers to be an MoE layer"
    return [Violation(f"model.config.{key}", getattr(settings, key), rule, remedy)]


def _widths(config: Config, settings: Any) -> list[Violation]:
    from transformers.activations import ACT2FN

    found = []
    multiple = ROW_BYTES // (4 if config.train.precision == "fp32" else 2)
    for key in ("hidden_size", "moe_intermediate_size"):
        if (width := getattr(settings, key)) % multiple:
            rule = f"is not a multiple of {multiple} (rows of experts start every {ROW_BYTES} bytes)"
            near = multiple * max(1, round(width / multiple))
            found.append(Violation(f"model.config.{key}", width, rule, f"give for example {near}"))
    if settings.hidden_act not in ACT2FN:
        rule = "is not an activation of transformers"
        found.append(Violation("model.config.hidden_act", settings.hidden_act, rule, "use silu"))
    return found


def _length(config: Config, settings: Any) -> list[Violation]:
    longest = settings.max_position_embeddings
    if config.data.sequence_length <= longest:
        return []
    rule = f"is longer than the model's {longest} positions"
    remedy = "shorten it, or raise model.config.max_position_embeddings"
    return [Violation("data.sequence_length", config.data.sequence_length, rule, remedy)]
