"""The balancing policies that the study of controllers compares, and one of them on its way through the steps.

Shapes: T tokens, E experts, K experts a token takes.
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
class Contender:
    """A policy and its place in the routing; name: with the rate where it has one.

    score: the gate function.
    by_threshold: threshold routing at 0.4 instead of top-K. level: it is shown scores without offsets, as a
    reference that nothing has to balance.
    """

    name: str
    policy: Policy
    score: Score
    by_threshold: bool = False
    level: bool = False

    @property
    def by_sign(self) -> bool:
        """Whether every update has the same size, so that the steps can be predicted from the distance."""
        return isinstance(self.policy, LossFree) and not self.policy.proportional

    def rule(self, experts: int, top_k: int) -> TopK | ThresholdRouting:
        """The rule of selection in a layer of this size."""
        if self.by_threshold:
            return ThresholdRouting(THRESHOLD, max_experts=experts)
        return TopK(top_k, self.score, multiplicative=self.policy.bias_multiplies_scores)

    def biased_space(self, logits_TE: Tensor) -> Tensor:
        """What the bias is added to: the logits of a softmax, else the scores, or their logarithms."""
        if self.score in OVER_LOGITS:
            return logits_TE
        scores_TE = gate_scores(logits_TE, self.score)
        return scores_TE.log() if self.policy.bias_multiplies_scores else scores_TE


LEVEL = (
    Contender("level scores, top-K", Unbalanced(), "sigmoid", level=True),
    Contender("level scores, threshold", Unbalanced(), "softmax", by_threshold=True, level=True),
)
CONTENDERS = (
    Contender(Unbalanced.name(), Unbalanced(), "sigmoid"),
    Contender("sign, 0.001", LossFree(rate=0.001), "sigmoid"),
    Contender("sign, 0.01", LossFree(rate=0.01), "sigmoid"),
    Contender("sign x score, 0.001", LossFree(rate=0.001, form="multiplicative"), "sigmoid"),
    Contender("proportional, 0.01", LossFree(rate=0.01, rule="proportional"), "softmax"),
    Contender("adaptive, 0.1", AdaptiveWeight(rate=0.1), "softmax"),
    Contender("adaptive threshold, 0.1", AdaptiveWeight(rate=0.1), "softmax", by_threshold=True),
    Contender("quantile, sigmoid", Quantile(), "sigmoid"),
    Contender("quantile, softmax", Quantile(), "softmax"),
)


class Course:
    """One contender on its way.

    bias_E: fp32 [E], the bias it has now. max_vio, experts_a_token: what each step so far has shown.
    """

    def __init__(self, contender: Contender, experts: int, top_k: int) -> None:
        self.contender = contender
        self.bias_E = torch.zeros(experts)
        self.max_vio: list[float] = []
        self.experts_a_token: list[float] = []
        self._rule = contender.rule(experts, top_k)

    def step(self, logits_TE: Tensor) -> None:
        """Route by the bias from before the step, measure the load, and let the policy move the bias."""
        tokens, experts = logits_TE.shape
        routing = select(logits_TE, self._rule, self.bias_E)
        layer_counts = count_routing(routing.ids_TK, experts, self._rule.max_experts_per_token)
        if self.contender.policy.needs_margins:
            scores_TE = self.contender.biased_space(logits_TE)
            layer_counts = layer_counts._replace(
                margins_EQ=count_margins(scores_TE, self.bias_E, self._rule.max_experts_per_token)
            )
        policy = self.contender.policy
        if policy.moves_bias:
            self.bias_E = policy.next_bias(self.bias_E, layer_counts, policy.rate_at(len(self.max_vio), 1))
        self.max_vio.append(float(max_vio(layer_counts.load_E)))
        self.experts_a_token.append(int(layer_counts.load_E.sum()) / tokens)
