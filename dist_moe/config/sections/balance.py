"""The fields of the balancer."""

from typing import Literal

from pydantic import Field

from dist_moe.section import Section


class BalanceConfig(Section):
    """How the load of the experts is kept even."""

    policy: Literal["none", "loss_free", "adaptive_weight", "quantile", "auxiliary"] = Field(
        default="loss_free",
        description="the balancer: loss_free (a bias for each expert, moved by its load error; arXiv 2408.15664), "
        "adaptive_weight (a factor on its probability, likewise), quantile (the bias that would have balanced the "
        "last step), auxiliary (a loss) or none",
    )
    rule: Literal["sign", "proportional"] | None = Field(
        default=None,
        description="the change of a bias: sign (by the rate), proportional (by the rate times the load error as a "
        "fraction of the mean), or null (the policy's own: sign for loss_free, proportional for adaptive_weight)",
    )
    form: Literal["additive", "multiplicative"] = Field(
        default="additive",
        description="the way in which a bias b meets a score: additive (plus b) or multiplicative (times exp(b)); for "
        "a softmax, b is added to the logits, which is both",
    )
    rate: float = Field(
        default=0.001,
        ge=0,
        description="the change of an expert's bias in one optimizer step, in units of the score (of the logit for "
        "a softmax)",
    )
    schedule: Literal["constant", "linear", "quadratic"] = Field(
        default="constant",
        description="the rate over the run: constant, linear or quadratic (both fall to 0 at train.schedule_steps, "
        "linearly, or as the square of what is left of the run)",
    )
    freeze_at: int | None = Field(
        default=None, ge=0, description="the optimizer steps after which no bias moves any more, or null (never)"
    )
    center: bool | None = Field(
        default=None,
        description="whether each layer's biases are moved to mean 0 after an update: true, false or null (the "
        "policy's own: false for loss_free, as in its paper, true for the others)",
    )
    clip: float | None = Field(
        default=None,
        gt=1,
        description="the largest weight that adaptive_weight gives an expert, and one over the smallest (above "
        "1), or null (no bound)",
    )
    applies_to: Literal["selection", "gate_weights"] = Field(
        default="selection",
        description="the use of the weights of adaptive_weight: selection, or gate_weights (in both)",
    )
    auxiliary_loss: float = Field(
        default=0.0,
        ge=0,
        description="the coefficient of the balance loss of each MoE layer, with any policy (0: off)",
    )
    auxiliary_scope: Literal["micro_batch", "sequence", "global_batch"] = Field(
        default="global_batch",
        description="the tokens over which the balance loss takes the load: micro_batch (on each worker), sequence, "
        "or global_batch (the last whole one, over all workers)",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="the coefficient of the z-loss, which keeps the router's logits small (0: off)",
    )
