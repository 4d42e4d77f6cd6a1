"""The balancing policies that the study of controllers compares, and the simulation of one of them.

Shapes: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_moe.balancing.counts import count_routing
from dist_moe.balancing.load import max_vio
from dist_moe.balancing.margins import count_margins
from dist_moe.moe.select import ExpertThreshold, ThresholdRouting, TopK, gate_scores, select
from dist_moe.policies.adaptive_weight import AdaptiveWeight
from dist_moe.policies.base import Policy, RuleState
from dist_moe.policies.ema_quantile import EmaQuantile
from dist_moe.policies.expert_threshold import ExpertThresholds
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.momentum import Momentum
from dist_moe.policies.quantile import Quantile
from dist_moe.policies.unbalanced import Unbalanced
from dist_moe.scores import OVER_LOGITS, Score

THRESHOLD = 0.4
"""The cumulative probability of threshold routing, as in its paper (Huang et al. 2024, arXiv 2403.07652)."""

Selection = Literal["top_k", "threshold", "expert_threshold"]


@dataclass(frozen=True)
class PolicyVariant:
    """A policy with its settings and its routing.

    Attributes:
        name: With the rate if there is one.
        policy: The policy.
        score: The gate function.
        selection: How tokens select experts; threshold routing is that at 0.4.
        without_offsets: Routes scores whose experts are equal, as the reference for the floor.
        unequal_shares: Whether the first quarter of the experts are to receive twice the share of the others.
    """

    name: str
    policy: Policy
    score: Score
    selection: Selection = "top_k"
    without_offsets: bool = False
    unequal_shares: bool = False

    @property
    def is_sign_rule(self) -> bool:
        """Whether all updates have the same size, so that the number of steps can be predicted."""
        return isinstance(self.policy, LossFree) and not self.policy.proportional

    def policy_for(self, experts: int) -> Policy:
        """Return the policy with the target shares for a layer of this size."""
        if not self.unequal_shares:
            return self.policy
        share = 2 / (experts + experts // 4)
        shares = {str(expert): share for expert in range(experts // 4)}
        return self.policy.model_copy(update={"shares": shares})

    def rule(self, experts: int, top_k: int) -> TopK | ThresholdRouting | ExpertThreshold:
        """Return the selection rule of a layer of this size."""
        if self.selection == "threshold":
            return ThresholdRouting(THRESHOLD, max_experts=experts)
        if self.selection == "expert_threshold":
            return ExpertThreshold(top_k, experts, 0, self.score)
        return TopK(top_k, self.score, multiplicative=self.policy.bias_multiplies_scores)

    def biased_space(self, logits_TE: Tensor) -> Tensor:
        """Return what the bias is added to: the logits of a softmax, otherwise the scores or their logarithms."""
        if self.score in OVER_LOGITS or self.selection == "expert_threshold":
            return logits_TE
        scores_TE = gate_scores(logits_TE, self.score)
        return scores_TE.log() if self.policy.bias_multiplies_scores else scores_TE


REFERENCES = (
    PolicyVariant("equal experts, top-K", Unbalanced(), "sigmoid", without_offsets=True),
    PolicyVariant("equal experts, threshold", Unbalanced(), "softmax", "threshold", without_offsets=True),
    PolicyVariant("equal experts, thresholds", Unbalanced(), "sigmoid", "expert_threshold", without_offsets=True),
)
VARIANTS = (
    PolicyVariant(Unbalanced.name(), Unbalanced(), "sigmoid"),
    PolicyVariant("sign, 0.001", LossFree(rate=0.001), "sigmoid"),
    PolicyVariant("sign, 0.01", LossFree(rate=0.01), "sigmoid"),
    PolicyVariant("sign x score, 0.001", LossFree(rate=0.001, form="multiplicative"), "sigmoid"),
    PolicyVariant("proportional, 0.01", LossFree(rate=0.01, rule="proportional"), "softmax"),
    PolicyVariant("adaptive, 0.1", AdaptiveWeight(rate=0.1), "softmax"),
    PolicyVariant("adaptive threshold, 0.1", AdaptiveWeight(rate=0.1), "softmax", "threshold"),
    PolicyVariant("adaptive, 0.1, shares", AdaptiveWeight(rate=0.1), "softmax", unequal_shares=True),
    PolicyVariant("momentum, 0.01", Momentum(rate=0.01), "sigmoid"),
    PolicyVariant("quantile, sigmoid", Quantile(), "sigmoid"),
    PolicyVariant("quantile, softmax", Quantile(), "softmax"),
    PolicyVariant("EMA quantile, sigmoid", EmaQuantile(), "sigmoid"),
    PolicyVariant("expert threshold", ExpertThresholds(), "sigmoid", "expert_threshold"),
)


class PolicySimulation:
    """Routes a series of scores under one policy, and updates its bias after each step.

    Attributes:
        variant: The policy.
        policy: It, with the target shares for this number of experts.
        memory: That of the rule.
        bias_E: fp32 [E], the current bias.
        shares: The target shares of the experts, against which MaxVio is measured; None for equal shares.
        max_vio: Of each step so far.
        experts_per_token: Of each step so far.
    """

    def __init__(self, variant: PolicyVariant, experts: int, top_k: int, noise_std: float = 1.0) -> None:
        self.variant = variant
        self.policy = variant.policy_for(experts)
        self.shares = self.policy.target_shares(experts)
        self.bias_E = torch.zeros(experts)
        self.memory = {name: torch.zeros(experts) for name in self.policy.memory}
        if variant.selection == "expert_threshold" and variant.without_offsets:
            # The thresholds that give each of the equal experts its share of normal logits.
            self.bias_E -= noise_std * torch.special.ndtri(torch.tensor(1 - top_k / experts))
        self.max_vio: list[float] = []
        self.experts_per_token: list[float] = []
        self._top_k = top_k
        self._rule = variant.rule(experts, top_k)

    def step(self, logits_TE: Tensor) -> None:
        """Route with the bias from before the step, measure the load, and update the bias."""
        tokens, experts = logits_TE.shape
        routing = select(logits_TE, self._rule, self.bias_E)
        counts = count_routing(routing.ids_TK, experts, self._rule.max_experts_per_token)
        if self.policy.needs_margins:
            scores_TE = self.variant.biased_space(logits_TE)
            limit = None if self.variant.selection == "expert_threshold" else self._top_k
            counts = counts._replace(margins_EQ=count_margins(scores_TE, self.bias_E, limit), top_k=self._top_k)
        if self.policy.moves_bias:
            rate = self.policy.rate_at(len(self.max_vio), 1)
            self.bias_E, memory = self.policy.next_state(RuleState(self.bias_E, self.memory), counts, rate)
            self.memory = dict(memory)
        self.max_vio.append(float(max_vio(counts.load_E, self.shares)))
        self.experts_per_token.append(int(counts.load_E.sum()) / tokens)
