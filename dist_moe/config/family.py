"""How each family of Hugging Face MoE models names the routing values in its config class."""

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["deepseek_v3", "qwen3_moe"]
Score = Literal["sigmoid", "softmax", "softmax_selected", "sqrt_softplus"]


@dataclass(frozen=True)
class Family:
    """The config fields of one family; None where the family has no such field.

    architecture: Hugging Face's `model_type`.
    experts: field with the number of routed experts of a layer.
    top_k: field with the experts a token takes.
    score: the gate function of the family's own router; no field, since each family has one only.
    normalise: field that says whether a token's weights are divided by their sum.
    scaling: field with the factor on the weights.
    groups, top_groups: fields with the number of expert groups, and of the groups a token may take from.
    undeclared: keys that the model's code reads though the config class does not declare them.
    """

    architecture: Architecture
    experts: str
    top_k: str
    score: Score
    normalize: str | None
    scaling: str | None
    groups: str | None
    topk_groups: str | None
    undeclared: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        architecture="deepseek_v3",
        experts="n_routed_experts",
        top_k="num_experts_per_tok",
        score="sigmoid",
        normalize="norm_topk_prob",
        scaling="routed_scaling_factor",
        groups="n_group",
        topk_groups="topk_group",
    ),
    "qwen3_moe": Family(
        architecture="qwen3_moe",
        experts="num_experts",
        top_k="num_experts_per_tok",
        score="softmax",
        normalize="norm_topk_prob",
        scaling=None,
        groups=None,
        topk_groups=None,
        undeclared=("head_dim",),
    ),
}


def family_of(architecture: str) -> Family:
    """The family with this `model_type`; a ValueError names the known ones."""
    if architecture not in FAMILIES:
        raise ValueError(f"architecture={architecture} is not a known family; use {' or '.join(FAMILIES)}")
    return FAMILIES[architecture]
