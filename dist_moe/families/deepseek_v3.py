"""DeepSeek-V3: sigmoid scores with a selection bias, expert groups, a shared expert, and latent attention."""

from typing import Any

from dist_moe.errors import Violation
from dist_moe.families.record import Family
from dist_moe.families.shapes import rotary_violations
from dist_moe.text import up_to


def moe_layers(settings: Any) -> list[int]:
    """All layers but the first `first_k_dense_replace`."""
    first = settings.first_k_dense_replace or 0  # null is refused by `shape_violations`
    return [layer for layer in range(settings.num_hidden_layers) if layer >= first]


def layers_remedy(settings: Any) -> tuple[str, str]:
    """What to do where no layer is an MoE layer."""
    return "first_k_dense_replace", f"give {up_to(settings.num_hidden_layers - 1, first=0)}"


def shape_violations(settings: Any) -> list[Violation]:
    """What latent attention and the dense layers need."""
    heads, shared, first = settings.num_attention_heads, settings.num_key_value_heads, settings.first_k_dense_replace
    violations = []
    if first is None or first < 0:
        rule = "does not say which layers are dense"
        violations.append(Violation("model.config.first_k_dense_replace", first, rule, "give 0 or more"))
    if settings.q_lora_rank is not None and settings.q_lora_rank < 1:
        remedy = "give 1 or more, or null (queries are not compressed)"
        violations.append(Violation("model.config.q_lora_rank", settings.q_lora_rank, "is not positive", remedy))
    if shared != heads:
        rule = f"differs from the {heads} attention heads (latent attention has equally many)"
        violations.append(Violation("model.config.num_key_value_heads", shared, rule, f"give {heads}"))
    return violations + rotary_violations("qk_rope_head_dim", settings.qk_rope_head_dim)


FAMILY = Family(
    architecture="deepseek_v3",
    block="DeepseekV3MoE",
    router="gate",
    experts="experts",
    score="sigmoid",
    shared_expert="shared_experts",
    bias_name="e_score_correction_bias",
    experts_key="n_routed_experts",
    top_k_key="num_experts_per_tok",
    normalize_key="norm_topk_prob",
    scaling_factor_key="routed_scaling_factor",
    groups_key="n_group",
    topk_groups_key="topk_group",
    positive_keys=("n_shared_experts", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    unsupported_keys={
        "num_mtp_layers": ((0,), "asks for multi-token prediction, which is not trained here"),
        "pretraining_tp": ((None, 1), "asks for the tensor parallelism of another program, which the model ignores"),
    },
    file_keys={
        "scoring_func": (("sigmoid",), "asks for another gate function than sigmoid"),
        "topk_method": (("noaux_tc",), "asks for another selection than top-K with a bias, within expert groups"),
        "moe_layer_freq": ((1,), "asks for dense layers among the MoE layers"),
        "ep_size": ((), ""),
        "aux_loss_alpha": ((), ""),
        "seq_aux": ((), ""),
    },
    rotary_keys_of_attention=("mscale_all_dim",),
    few_layers={"num_hidden_layers": 3, "first_k_dense_replace": 1},
    moe_layers=moe_layers,
    layers_remedy=layers_remedy,
    shape_violations=shape_violations,
)
