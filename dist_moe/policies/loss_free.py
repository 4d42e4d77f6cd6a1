"""Loss-Free Balancing (Wang et al. 2024, arXiv 2408.15664): a bias of each expert, moved by its load error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dist_moe.policies.base import LayerCounts
from dist_moe.policies.load_error import LoadErrorPolicy, centered, check_bias, load_error

if TYPE_CHECKING:
    from torch import Tensor


class LossFree(LoadErrorPolicy):
    """A bias on each expert's score; by default the sign rule of the paper, without centering."""

    policy: Literal["loss_free"] = Field(
        default="loss_free", description="a bias of each expert, moved by its load error; arXiv 2408.15664"
    )
    form: Literal["additive", "multiplicative"] = Field(
        default="additive",
        description="the way the bias b is applied to the score: additive (plus b) or multiplicative (times exp(b)); "
        "for a softmax, b is added to the logits, which is both",
    )

    center_by_default: ClassVar[bool] = False

    @property
    def bias_multiplies_scores(self) -> bool:
        """Whether a score is multiplied by exp(bias), where the bias would be added to it otherwise."""
        return self.form == "multiplicative"

    def next_bias(self, bias_E: Tensor, counts: LayerCounts, rate: float) -> Tensor:
        """The next selection bias; see `loss_free_update`."""
        return loss_free_update(
            bias_E, counts.load_E, rate, self.centers, self.proportional, self.target_shares(bias_E.numel())
        )


def loss_free_update(
    bias_E: Tensor,
    load_E: Tensor,
    rate: float,
    center: bool = False,
    proportional: bool = False,
    shares: Sequence[float] | None = None,
) -> Tensor:
    """Compute the next selection bias.

    With the load error e_i = (mean(c) - c_i) / mean(c), the sign rule is b_i + u * sign(e_i), Algorithm 1 of the
    paper, and the proportional rule its variant b_i + u * e_i.

    Args:
        bias_E: [E] fp32, the current bias.
        load_E: [E] int64, assignments of one optimizer step over ALL ranks.
        rate: u, in units of what the bias is added to (score or logit; a logarithm where it multiplies).
        center: Subtract the mean of the result. The sign rule of the paper does not, and its mean drifts when the
            load is skewed (one hot expert of 8: up by 0.75 u each step).
        proportional: Use the proportional rule.
        shares: The target of each expert, as `load_error` takes it; None for equal ones.

    Returns:
        [E] fp32, a new tensor.

    Raises:
        TypeError: The load is not int64 or the bias is not fp32.
    """
    check_bias(bias_E)
    error_E = load_error(load_E, shares)
    return centered(bias_E + rate * (error_E if proportional else error_E.sign()), center)
