"""Adaptive expert weights: a factor on each expert's routing probability, moved by its load.

After Wen et al. 2025, Frontiers in Neurorobotics 19:1590994, whose abstract says that after each routing step a
weight per expert is adjusted from the load and shapes the next routing, without an auxiliary loss and without a
change of gradients. The equations of the paper were not available: the rule below is a reconstruction, and each
choice in it is a field of the configuration (rule, rate, clip, applies_to).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dist_moe.policies.base import LayerCounts, Refusal
from dist_moe.policies.load_error import LoadErrorPolicy, centered, check_bias, load_error
from dist_moe.policies.loss_free import LossFree
from dist_moe.scores import OVER_LOGITS

if TYPE_CHECKING:
    from torch import Tensor


class AdaptiveWeight(LoadErrorPolicy):
    """A weight on each expert's probability, whose logarithm is the router's bias on its logits."""

    policy: Literal["adaptive_weight"] = Field(
        default="adaptive_weight", description="a factor on the probability of each expert, moved by its load error"
    )
    clip: float | None = Field(
        default=None,
        gt=1,
        description="the largest weight of an expert, and the inverse of the smallest (above 1), or null (no bound)",
    )
    applies_to: Literal["selection", "gate_weights"] = Field(
        default="selection",
        description="the use of the weights: the selection alone, or the gate weights too (gate_weights)",
    )

    proportional_by_default: ClassVar[bool] = True
    bias_is_log_weight: ClassVar[bool] = True

    @classmethod
    def refusal(cls, selection: str, score: str) -> Refusal | None:
        """Refuse scores that are not probabilities."""
        if score in OVER_LOGITS:
            return None
        return Refusal(
            "needs probabilities for its weights to multiply, which only the softmax scores give",
            f"set router.score=softmax, or balance.policy={LossFree.name()} with balance.form=multiplicative",
        )

    @property
    def bias_in_gate_weights(self) -> bool:
        """Whether the weights change the gate weights too, and not the selection alone."""
        return self.applies_to == "gate_weights"

    def next_bias(self, bias_E: Tensor, counts: LayerCounts, rate: float) -> Tensor:
        """The logarithms of the next weights; see `adaptive_weight_update`."""
        shares = self.target_shares(bias_E.numel())
        return adaptive_weight_update(bias_E, counts.load_E, rate, self.clip, self.proportional, self.centers, shares)


def adaptive_weight_update(
    log_weight_E: Tensor,
    load_E: Tensor,
    rate: float,
    clip: float | None = None,
    proportional: bool = True,
    center: bool = True,
    shares: Sequence[float] | None = None,
) -> Tensor:
    """Compute the next weights w_i * exp(rate * e_i), as logarithms.

    The selection is by w_i P_i / sum_j w_j P_j with P the softmax of the logits, which is the softmax of the logits
    plus log w: so log w is the router's bias on its logits.

    Args:
        log_weight_E: [E] fp32, log w; 0 is neutral.
        load_E: [E] int64, assignments of one optimizer step over ALL ranks.
        rate: Factor on the error e_i = (mean(c) - c_i) / mean(c).
        clip: Bounds of w, 1 / clip and clip, applied after centering; None is no bound.
        proportional: Use e_i itself; its sign otherwise.
        center: Divide by the geometric mean, which does not change the selection and keeps the weights from
            drifting.
        shares: The target of each expert, as `load_error` takes it; None for equal ones.

    Returns:
        [E] fp32, a new tensor.

    Raises:
        TypeError: The load is not int64 or the weights are not fp32.
        ValueError: `clip` is not above 1.
    """
    check_bias(log_weight_E)
    if clip is not None and clip <= 1:
        raise ValueError(f"clip={clip}; it bounds a weight from above, and 1 / clip from below; give more than 1")
    error_E = load_error(load_E, shares)
    updated_E = centered(log_weight_E + rate * (error_E if proportional else error_E.sign()), center)
    return updated_E if clip is None else updated_E.clamp(-math.log(clip), math.log(clip))
