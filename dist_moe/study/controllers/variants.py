"""The balancing policies that the study of controllers compares, and the simulation of one of them.

Shapes: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.balance.counts import count_routing
from dist_moe.balance.load import max_vio
from dist_moe.balance.rules.quantile import count_margins
from dist_moe.balance.spec import BalanceSettings, update_rule
from dist_moe.config.family import Score
from dist_moe.moe.select import OVER_LOGITS, ThresholdRouting, TopK, gate_scores, select

THRESHOLD = 0.4
"""The cumulative probability of threshold routing, as in its paper (Huang et al. 2024, arXiv 2403.07652)."""


@dataclass(frozen=True)
class PolicyVariant:
    """A policy with its settings and its routing.

    Attributes:
        name: with the rate if there is one.
        policy: as in `BalanceSettings`.
        score: the gate function.
        rate: as in `BalanceSettings`.
        proportional: as in `BalanceSettings`.
        multiplicative: as in `TopK`.
        threshold_routing: threshold routing at 0.4 instead of top-K.
        without_offsets: routes scores whose experts are equal, as the reference for the floor.
    """

    name: str
    policy: str
    score: Score
    rate: float = 0.0
    proportional: bool | None = None
    multiplicative: bool = False
    threshold_routing: bool = False
    without_offsets: bool = False

    @property
    def is_sign_rule(self) -> bool:
        """Whether all updates have the same size, so that the number of steps can be predicted."""
        return self.policy == "loss_free" and not self.proportional

    @property
    def settings(self) -> BalanceSettings:
        """The settings of the update rule."""
        return BalanceSettings(self.policy, self.rate, "constant", 1, proportional=self.proportional)

    def selection(self, experts: int, top_k: int) -> TopK | ThresholdRouting:
        """Return the selection rule of a layer of this size."""
        if self.threshold_routing:
            return ThresholdRouting(THRESHOLD, max_experts=experts)
        return TopK(top_k, self.score, multiplicative=self.multiplicative)

    def biased_space(self, logits_TE: Tensor) -> Tensor:
        """Return what the bias is added to: the logits of a softmax, otherwise the scores or their logarithms."""
        if self.score in OVER_LOGITS:
            return logits_TE
        scores_TE = gate_scores(logits_TE, self.score)
        return scores_TE.log() if self.multiplicative else scores_TE


REFERENCES = (
    PolicyVariant("equal experts, top-K", "none", "sigmoid", without_offsets=True),
    PolicyVariant("equal experts, threshold", "none", "softmax", threshold_routing=True, without_offsets=True),
)
VARIANTS = (
    PolicyVariant("none", "none", "sigmoid"),
    PolicyVariant("sign, 0.001", "loss_free", "sigmoid", 0.001),
    PolicyVariant("sign, 0.01", "loss_free", "sigmoid", 0.01),
    PolicyVariant("sign x score, 0.001", "loss_free", "sigmoid", 0.001, multiplicative=True),
    PolicyVariant("proportional, 0.01", "loss_free", "softmax", 0.01, proportional=True),
    PolicyVariant("adaptive, 0.1", "adaptive_weight", "softmax", 0.1),
    PolicyVariant("adaptive threshold, 0.1", "adaptive_weight", "softmax", 0.1, threshold_routing=True),
    PolicyVariant("quantile, sigmoid", "quantile", "sigmoid"),
    PolicyVariant("quantile, softmax", "quantile", "softmax"),
)


class PolicySimulation:
    """Routes a series of scores under one policy, and updates its bias after each step.

    Attributes:
        variant: the policy.
        bias_E: fp32 [E], the current bias.
        max_vio: of each step so far.
        experts_per_token: of each step so far.
    """

    def __init__(self, variant: PolicyVariant, experts: int, top_k: int) -> None:
        self.variant = variant
        self.bias_E = torch.zeros(experts)
        self.max_vio: list[float] = []
        self.experts_per_token: list[float] = []
        self._selection = variant.selection(experts, top_k)
        self._settings = variant.settings
        self._update = update_rule(self._settings)

    def step(self, logits_TE: Tensor) -> None:
        """Route with the bias from before the step, measure the load, and update the bias."""
        tokens, experts = logits_TE.shape
        max_experts = self._selection.max_experts_per_token
        routing = select(logits_TE, self._selection, self.bias_E)
        counts = count_routing(routing.ids_TK, experts, max_experts)
        if self._settings.counts_margins:
            scores_TE = self.variant.biased_space(logits_TE)
            counts = counts._replace(margins_EQ=count_margins(scores_TE, self.bias_E, max_experts))
        if self._update is not None:
            self.bias_E = self._update(self.bias_E, counts, self._settings.rate_at(len(self.max_vio)))
        self.max_vio.append(float(max_vio(counts.load_E)))
        self.experts_per_token.append(int(counts.load_E.sum()) / tokens)
