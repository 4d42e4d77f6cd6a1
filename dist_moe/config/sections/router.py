"""The section `router`: how tokens select experts."""

from typing import Literal

from pydantic import Field

from dist_moe.scores import Score
from dist_moe.section import Section


class RouterConfig(Section):
    """How tokens select experts; null means the value of the Hugging Face config."""

    selection: Literal["top_k", "threshold", "expert_threshold", "uniform", "zipf"] = Field(
        default="top_k",
        description="the selection of a token's experts: top_k (the same number for each token), threshold (experts "
        "in order of probability until their sum reaches router.threshold; arXiv 2403.07652), "
        "expert_threshold (the experts whose own threshold the token's logit exceeds, top_k of them on average; arXiv "
        "2603.11535), or, for benchmarks, "
        "uniform and zipf (top_k experts drawn at random)",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="the experts each token takes, with expert thresholds on average (1 or more), or null",
    )
    threshold: float = Field(
        default=0.4,
        gt=0,
        lt=1,
        description="the cumulative probability that the experts of a token reach, with threshold routing "
        "(between 0 and 1); its initial value, if there is a target",
    )
    max_experts: int | None = Field(
        default=None,
        ge=1,
        description="the maximum number of experts a token takes, with threshold routing or expert thresholds (1 or "
        "more), or null (all)",
    )
    min_experts: int = Field(
        default=0,
        ge=0,
        le=1,
        description="the minimum number of experts a token takes with expert thresholds, 0 or 1; a token without any "
        "passes the layer by its residual connection and a shared expert alone",
    )
    target_experts_per_token: float | None = Field(
        default=None,
        gt=0,
        description="the experts a token is to take on average, reached by a controller of the threshold (1 to below "
        "max_experts), or null (a constant threshold)",
    )
    entropy_loss: float = Field(
        default=0.0,
        ge=0,
        description="the coefficient of the entropy of the routing probabilities in the loss (0: off; 1e-4 in the "
        "paper of threshold routing)",
    )
    zipf_exponent: float = Field(
        default=1.0,
        ge=0,
        description="the exponent of zipf: a token first draws expert i with probability ~ 1 / (i + 1)^zipf_exponent",
    )
    score: Score | None = Field(
        default=None,
        description="the gate function from logits to scores: sigmoid, softmax, softmax_selected (over the selected "
        "experts only), sqrt_softplus, or null (the family's own)",
    )
    normalize: bool | None = Field(
        default=None,
        description="whether the weights of a token's experts are divided by their sum: true, false or null",
    )
    scaling_factor: float | None = Field(
        default=None, gt=0, description="the factor on the weights of a token's experts (above 0), or null"
    )
    groups: int | None = Field(
        default=None,
        ge=1,
        description="the number of groups the experts are divided into (1: no groups), or null",
    )
    topk_groups: int | None = Field(
        default=None,
        ge=1,
        description="the number of groups a token may take experts from (1 or more), or null",
    )
