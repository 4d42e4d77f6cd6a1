"""Quantile balancing with an exponential average: the noise of a single batch weighs less.

The bias of `quantile` is exact for the last batch, its noise included. Here it is averaged over steps. With decay d,
the average is m <- d m + (1 - d) q of the bias q of each step and the sum of its weights w <- d w + (1 - d), both 0 at
first; the bias is m / w, which is q itself after the first step. The average is ours; quantile balancing is that of
J. Su 2026, kexue.fm/archives/11619.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dist_moe.policies.base import LayerCounts, RuleState
from dist_moe.policies.quantile import QuantilePolicy

if TYPE_CHECKING:
    from torch import Tensor

SUM, WEIGHT = "quantile_sum", "quantile_weight"


class AverageQuantilePolicy(QuantilePolicy):
    """A policy whose bias is an exponential average, over the optimizer steps, of those that would have balanced each.

    The average is a memory of two tensors, and the bias their quotient.
    """

    decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="the weight of the earlier steps in the exponential average (0: the last step alone)",
    )

    memory: ClassVar[tuple[str, ...]] = (SUM, WEIGHT)

    def next_state(self, state: RuleState, counts: LayerCounts, rate: float) -> RuleState:
        """The next bias, and the sum and the weight of the average; see `average_update`."""
        if counts.margins_EQ is not None and not bool(counts.margins_EQ.any()):
            return RuleState(state.bias_E.clone(), {name: value.clone() for name, value in state.memory.items()})
        value_E = self.balancing_bias(state.bias_E, counts)
        sum_E, weight_E = average_update(state.memory[SUM], state.memory[WEIGHT], value_E, self.decay)
        return RuleState(sum_E / weight_E, {SUM: sum_E, WEIGHT: weight_E})


class EmaQuantile(AverageQuantilePolicy):
    """The bias of quantile balancing, averaged exponentially over the optimizer steps."""

    policy: Literal["ema_quantile"] = Field(
        default="ema_quantile", description="the bias of quantile, averaged exponentially over the steps"
    )


def average_update(sum_E: Tensor, weight_E: Tensor, value_E: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Add a value to an exponential average, which is the sum divided by the weight.

    Args:
        sum_E: [E] fp32, the weighted sum of the earlier values; 0 without any.
        weight_E: [E] fp32, the sum of their weights; 0 without any, and 1 after many.
        value_E: [E] fp32, the new value.
        decay: The weight of the earlier values, 0 to below 1.

    Returns:
        The next sum and weight, new tensors.
    """
    return decay * sum_E + (1 - decay) * value_E, decay * weight_E + (1 - decay)
