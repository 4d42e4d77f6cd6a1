"""Qwen3-MoE: softmax scores without a bias, and grouped-query attention."""

from typing import Any

from dist_moe.errors import Violation
from dist_moe.families.record import Family
from dist_moe.families.shapes import (
    grouped_query_violations,
    sparse_step_layers,
    sparse_step_remedy,
    sparse_step_violations,
)


def shape_violations(settings: Any) -> list[Violation]:
    """What the attention and the choice of the MoE layers need."""
    violations = [*grouped_query_violations(settings), *sparse_step_violations(settings)]
    window = settings.sliding_window  # None unless use_sliding_window is true
    if settings.use_sliding_window and (window is None or window < 1):
        violations.append(Violation("model.config.sliding_window", window, "is not positive", "give 1 or more"))
    return violations


FAMILY = Family(
    architecture="qwen3_moe",
    block="Qwen3MoeSparseMoeBlock",
    router="gate",
    experts="experts",
    score="softmax",
    experts_key="num_experts",
    top_k_key="num_experts_per_tok",
    normalize_key="norm_topk_prob",
    undeclared_keys=("head_dim",),
    positive_keys=("num_key_value_heads", "decoder_sparse_step"),
    switched_keys={"sliding_window": "use_sliding_window"},
    file_keys={"max_window_layers": ((), "")},
    few_layers={"num_hidden_layers": 2, "mlp_only_layers": [], "decoder_sparse_step": 1},
    moe_layers=sparse_step_layers,
    layers_remedy=sparse_step_remedy,
    shape_violations=shape_violations,
)
