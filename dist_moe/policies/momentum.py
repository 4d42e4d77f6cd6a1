"""SMEBU, soft-clamped momentum expert bias updates: momentum, and a hyperbolic tangent in place of the sign.

Arcee Trinity Large technical report 2026, arXiv 2602.17004. The report itself was not available: the rule below is
reconstructed from two public descriptions of it that agree, which also give its momentum (0.5) and sharpness (2).
`bias_limit` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dist_moe.policies.base import LayerCounts, RuleState, SharesPolicy
from dist_moe.policies.load_error import centered, check_bias, load_error

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM = "momentum"


class Momentum(SharesPolicy):
    """A bias on each expert's score, moved by an exponential average of bounded changes."""

    policy: Literal["momentum"] = Field(
        default="momentum", description="a bias of each expert, moved with momentum and a soft clamp; arXiv 2602.17004"
    )
    momentum: float = Field(
        default=0.5, ge=0, lt=1, description="the weight of the earlier changes of a bias in its next change (0: none)"
    )
    sharpness: float = Field(
        default=2.0,
        gt=0,
        description="the factor on the load error in tanh(factor * error), to which a change is proportional; a large "
        "one makes it the sign",
    )
    bias_limit: float | None = Field(
        default=None, gt=0, description="the largest absolute value of a bias (above 0), or null (no bound)"
    )

    has_rate: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = (MOMENTUM,)

    def next_state(self, state: RuleState, counts: LayerCounts, rate: float) -> RuleState:
        """The next bias and its momentum; see `momentum_update`."""
        bias_E, momentum_E = momentum_update(
            state.bias_E,
            state.memory[MOMENTUM],
            counts.load_E,
            rate,
            self.momentum,
            self.sharpness,
            self.bias_limit,
            self.centers,
            self.target_shares(state.bias_E.numel()),
        )
        return RuleState(bias_E, {MOMENTUM: momentum_E})


def momentum_update(
    bias_E: Tensor,
    momentum_E: Tensor,
    load_E: Tensor,
    rate: float,
    momentum: float = 0.5,
    sharpness: float = 2.0,
    bias_limit: float | None = None,
    center: bool = True,
    shares: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the next bias b_i + m_i and momentum m_i = beta m_i + (1 - beta) d_i, with d_i = u tanh(kappa e_i).

    Args:
        bias_E: [E] fp32, b.
        momentum_E: [E] fp32, m; 0 at first.
        load_E: [E] int64, assignments of one optimizer step over ALL ranks.
        rate: u, the largest change of a bias in a step before centering.
        momentum: beta.
        sharpness: kappa, on the load error e_i = (mean(c) - c_i) / mean(c).
        bias_limit: Bound of |b|, applied last; None is no bound.
        center: Subtract the mean of the changes d.
        shares: The target of each expert, as `load_error` takes it; None for equal ones.

    Returns:
        The next bias and momentum, [E] fp32, new tensors.

    Raises:
        TypeError: The load is not int64 or the bias is not fp32.
    """
    check_bias(bias_E)
    change_E = centered(rate * (sharpness * load_error(load_E, shares)).tanh(), center)
    next_momentum_E = momentum * momentum_E + (1 - momentum) * change_E
    next_bias_E = bias_E + next_momentum_E
    return next_bias_E if bias_limit is None else next_bias_E.clamp(-bias_limit, bias_limit), next_momentum_E
