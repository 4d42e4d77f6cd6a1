"""The fields of the router and of the balancer; worded as those in `schema`."""

from typing import Literal

from pydantic import Field

from dist_moe.config.family import Score
from dist_moe.section import Section


class RouterConfig(Section):
    """How a token finds its experts; null means what the Hugging Face config says."""

    selection: Literal["top_k", "threshold", "uniform", "zipf"] = Field(
        default="top_k",
        description="the rule by which a token takes experts: top_k (the same number for each token), threshold "
        "(as many as it takes until their probability passes router.threshold; arXiv 2403.07652), or, for "
        "benchmarks, uniform and zipf (top_k experts drawn at random)",
    )
    top_k: int | None = Field(default=None, ge=1, description="the experts each token takes (1 or more), or null")
    threshold: float = Field(
        default=0.4,
        gt=0,
        lt=1,
        description="the cumulative probability that the experts of a token reach, with threshold routing "
        "(between 0 and 1); where it begins, if there is a target",
    )
    max_experts: int | None = Field(
        default=None,
        ge=1,
        description="the experts a token takes at most, with threshold routing (1 or more), or null (all)",
    )
    target_experts_per_token: float | None = Field(
        default=None,
        gt=0,
        description="the experts a token takes on average, held by a controller that moves the threshold "
        "(1 to below max_experts), or null (the threshold stays)",
    )
    entropy_loss: float = Field(
        default=0.0,
        ge=0,
        description="the coefficient of the entropy of the routing probabilities in the loss (0: off; the "
        "paper of threshold routing has 1e-4)",
    )
    zipf_exponent: float = Field(
        default=1.0,
        ge=0,
        description="the exponent of zipf: a token first draws expert i with probability ~ 1 / (i + 1)^zipf_exponent",
    )
    score: Score | None = Field(
        default=None,
        description="the gate function from logits to scores: sigmoid, softmax, softmax_selected (over a "
        "token's experts alone), sqrt_softplus, or null (the family's own)",
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
