"""The settings of balancing, and the update rule that each policy is."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dist_moe.balance.counts import RoutingCounts
from dist_moe.balance.rules.adaptive_weight import adaptive_weight_update
from dist_moe.balance.rules.loss_free import loss_free_update
from dist_moe.balance.rules.quantile import quantile_update

# (bias_E fp32, the layer's counts over all ranks, rate) -> the next bias_E
UpdateRule = Callable[[Tensor, RoutingCounts, float], Tensor]
# What null stands for, by policy: the paper's own.
PROPORTIONAL = {"loss_free": False, "adaptive_weight": True}
CENTER = {"loss_free": False, "adaptive_weight": True, "quantile": True}


@dataclass(frozen=True)
class BalanceSettings:
    """What the balancer needs to know of the config.

    policy: "none" and "auxiliary" move no bias. rate: u at the first step. schedule: "constant", or "linear" or
    "quadratic", which fall to 0 at `schedule_steps` taken steps. centre, proportional: None is the policy's own.
    freeze_at: taken steps after which no bias moves. clip: bounds of adaptive weights. budget: experts a token takes
    on average, with threshold routing; None leaves the threshold alone.
    """

    policy: str
    rate: float
    schedule: str
    schedule_steps: int
    center: bool | None = None
    proportional: bool | None = None
    freeze_at: int | None = None
    clip: float | None = None
    budget: float | None = None

    @property
    def counts_margins(self) -> bool:
        """Whether the policy reads the histograms of margins."""
        return self.policy == "quantile"

    def rate_at(self, taken: int) -> float:
        """The rate u for the update after `taken` steps were taken before; 0 for a policy that has none."""
        if self.policy in ("none", "auxiliary", "quantile") or self.frozen_at(taken):
            return 0.0
        if self.schedule == "constant":
            return self.rate
        left = max(0.0, 1.0 - taken / self.schedule_steps)
        return self.rate * (left if self.schedule == "linear" else left**2)

    def frozen_at(self, taken: int) -> bool:
        """Whether biases stand still from now on."""
        return self.freeze_at is not None and taken >= self.freeze_at


def update_rule(settings: BalanceSettings) -> UpdateRule | None:
    """The pure rule of a policy; None where no bias moves. Errors: ValueError for an unknown policy."""
    policy = settings.policy
    if policy in ("none", "auxiliary"):
        return None
    if policy not in CENTER:
        raise ValueError(f"balance.policy={policy!r} is unknown; use none, auxiliary or one of {', '.join(CENTER)}")
    center = CENTER[policy] if settings.center is None else settings.center
    if policy == "quantile":
        return lambda bias_E, layer_counts, rate: _by_quantile(bias_E, layer_counts, center)
    proportional = PROPORTIONAL[policy] if settings.proportional is None else settings.proportional
    if policy == "loss_free":
        return lambda bias_E, layer_counts, rate: loss_free_update(
            bias_E, layer_counts.load_E, rate, center, proportional
        )
    clip = settings.clip
    return lambda bias_E, layer_counts, rate: adaptive_weight_update(
        bias_E, layer_counts.load_E, rate, clip, proportional, center
    )


def _by_quantile(bias_E: Tensor, layer_counts: RoutingCounts, center: bool) -> Tensor:
    if layer_counts.margins_EQ is None:
        raise RuntimeError("the quantile policy was given no margins; the task was made for another policy")
    experts_a_token = layer_counts.k_histogram_K.numel()
    return quantile_update(bias_E, layer_counts.margins_EQ, experts_a_token / bias_E.numel(), center)
