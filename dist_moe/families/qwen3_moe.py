"""Qwen3-MoE: softmax scores without a bias, and grouped-query attention."""

from dist_moe.families.record import Family
from dist_moe.families.shapes import grouped_query_violations, sparse_step_layers, sparse_step_remedy

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
    few_layers={"num_hidden_layers": 2, "mlp_only_layers": [], "decoder_sparse_step": 1},
    moe_layers=sparse_step_layers,
    layers_remedy=sparse_step_remedy,
    shape_violations=grouped_query_violations,
)
