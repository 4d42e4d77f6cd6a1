"""The balancing policies that the study of controllers compares, and the simulation of one of them.

Shapes: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.balance.counts import count_routing
from dist_moe.balance.load import max_vio
from dist_moe.balance.margins import count_margins
from dist_moe.moe.select import ThresholdRouting, TopK, gate_scores, select
from dist_moe.policies.adaptive_weight import AdaptiveWeight
from dist_moe.policies.base import Policy
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.quantile import Quantile
from dist_moe.policies.unbalanced import Unbalanced
from dist_moe.scores import OVER_LOGITS, Score

THRESHOLD = 0.4
"""The cumulative probability of threshold routing, as in its paper (Huang et al. 2024, arXiv 2403.07652)."""


@dataclass(frozen=True)
class PolicyVariant:
    """A policy with its settings and its routing.

    Attributes:
        name: With the rate if there is one.
        policy: The policy.
        score: The gate function.
        threshold_routing: Threshold routing at 0.4 instead of top-K.
        without_offsets: Routes scores whose experts are equal, as the reference for the floor.
    """

    name: str
    policy: Policy
    score: Score
    threshold_routing: bool = False
    without_offsets: bool = False

    @property
    def is_sign_rule(self) -> bool:
        """Whether all updates have the same size, so that the number of steps can be predicted."""
        return isinstance(self.policy, LossFree) and not self.policy.proportional

    def selection(self, experts: int, top_k: int) -> TopK | ThresholdRouting:
        """Return the selection rule of a layer of this size."""
        if self.threshold_routing:
            return ThresholdRouting(THRESHOLD, max_experts=experts)
        return TopK(top_k, self.score, multiplicative=self.policy.bias_multiplies_scores)

    def biased_space(self, logits_TE: Tensor) -> Tensor:
        """Return what the bias is added to: the logits of a softmax, otherwise the scores or their logarithms."""
        if self.score in OVER_LOGITS:
            return logits_TE
        scores_TE = gate_scores(logits_TE, self.score)
        return scores_TE.log() if self.policy.bias_multiplies_scores else scores_TE


REFERENCES = (
    PolicyVariant("equal experts, top-K", Unbalanced(), "sigmoid", without_offsets=True),
    PolicyVariant("equal experts, threshold", Unbalanced(), "softmax", threshold_routing=True, without_offsets=True),
)
VARIANTS = (
    PolicyVariant(Unbalanced.name(), Unbalanced(), "sigmoid"),
    PolicyVariant("sign, 0.001", LossFree(rate=0.001), "sigmoid"),
    PolicyVariant("sign, 0.01", LossFree(rate=0.01), "sigmoid"),
    PolicyVariant("sign x score, 0.001", LossFree(rate=0.001, form="multiplicative"), "sigmoid"),
    PolicyVariant("proportional, 0.01", LossFree(rate=0.01, rule="proportional"), "softmax"),
    PolicyVariant("adaptive, 0.1", AdaptiveWeight(rate=0.1), "softmax"),
    PolicyVariant("adaptive threshold, 0.1", AdaptiveWeight(rate=0.1), "softmax", threshold_routing=True),
    PolicyVariant("quantile, sigmoid", Quantile(), "sigmoid"),
    PolicyVariant("quantile, softmax", Quantile(), "softmax"),
)


class PolicySimulation:
    """Routes a series of scores under one policy, and updates its bias after each step.

    Attributes:
        variant: The policy.
        bias_E: fp32 [E], the current bias.
        max_vio: Of each step so far.
        experts_per_token: Of each step so far.
    """

    def __init__(self, variant: PolicyVariant, experts: int, top_k: int) -> None:
        self.variant = variant
        self.bias_E = torch.zeros(experts)
        self.max_vio: list[float] = []
        self.experts_per_token: list[float] = []
        self._selection = variant.selection(experts, top_k)

    def step(self, logits_TE: Tensor) -> None:
        """Route with the bias from before the step, measure the load, and update the bias."""
        tokens, experts = logits_TE.shape
        max_experts = self._selection.max_experts_per_token
        routing = select(logits_TE, self._selection, self.bias_E)
        counts = count_routing(routing.ids_TK, experts, max_experts)
        policy = self.variant.policy
        if policy.needs_margins:
            scores_TE = self.variant.biased_space(logits_TE)
            counts = counts._replace(margins_EQ=count_margins(scores_TE, self.bias_E, max_experts))
        if policy.moves_bias:
            self.bias_E = policy.next_bias(self.bias_E, counts, policy.rate_at(len(self.max_vio), 1))
        self.max_vio.append(float(max_vio(counts.load_E)))
        self.experts_per_token.append(int(counts.load_E.sum()) / tokens)
