"""The balancing policies that the study of controllers compares, and one of them on its way through the steps.

Shapes: T tokens, E experts, K experts a token takes.
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
class Contender:
    """A policy and its place in the routing; name: with the rate where it has one.

    policy, rate, proportional: as in `BalanceSettings`. score: the gate function. multiplicative: as in `TopK`.
    by_threshold: threshold routing at 0.4 instead of top-K. level: it is shown scores without offsets, as a
    reference that nothing has to balance.
    """

    name: str
    policy: str
    score: Score
    rate: float = 0.0
    proportional: bool | None = None
    multiplicative: bool = False
    by_threshold: bool = False
    level: bool = False

    @property
    def by_sign(self) -> bool:
        """Whether every update has the same size, so that the steps can be predicted from the distance."""
        return self.policy == "loss_free" and not self.proportional

    @property
    def settings(self) -> BalanceSettings:
        """What the update rule is made of."""
        return BalanceSettings(self.policy, self.rate, "constant", 1, proportional=self.proportional)

    def rule(self, experts: int, top_k: int) -> TopK | ThresholdRouting:
        """The rule of selection in a layer of this size."""
        if self.by_threshold:
            return ThresholdRouting(THRESHOLD, max_experts=experts)
        return TopK(top_k, self.score, multiplicative=self.multiplicative)

    def biased_space(self, logits_TE: Tensor) -> Tensor:
        """What the bias is added to: the logits of a softmax, else the scores, or their logarithms."""
        if self.score in OVER_LOGITS:
            return logits_TE
        scores_TE = gate_scores(logits_TE, self.score)
        return scores_TE.log() if self.multiplicative else scores_TE


LEVEL = (
    Contender("level scores, top-K", "none", "sigmoid", level=True),
    Contender("level scores, threshold", "none", "softmax", by_threshold=True, level=True),
)
CONTENDERS = (
    Contender("none", "none", "sigmoid"),
    Contender("sign, 0.001", "loss_free", "sigmoid", 0.001),
    Contender("sign, 0.01", "loss_free", "sigmoid", 0.01),
    Contender("sign x score, 0.001", "loss_free", "sigmoid", 0.001, multiplicative=True),
    Contender("proportional, 0.01", "loss_free", "softmax", 0.01, proportional=True),
    Contender("adaptive, 0.1", "adaptive_weight", "softmax", 0.1),
    Contender("adaptive threshold, 0.1", "adaptive_weight", "softmax", 0.1, by_threshold=True),
    Contender("quantile, sigmoid", "quantile", "sigmoid"),
    Contender("quantile, softmax", "quantile", "softmax"),
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
        self._settings = contender.settings
        self._update = update_rule(self._settings)

    def step(self, logits_TE: Tensor) -> None:
        """Route by the bias from before the step, measure the load, and let the policy move the bias."""
        tokens, experts = logits_TE.shape
        routing = select(logits_TE, self._rule, self.bias_E)
        layer_counts = count_routing(routing.ids_TK, experts, self._rule.max_experts_per_token)
        if self._settings.counts_margins:
            scores_TE = self.contender.biased_space(logits_TE)
            layer_counts = layer_counts._replace(
                margins_EQ=count_margins(scores_TE, self.bias_E, self._rule.max_experts_per_token)
            )
        if self._update is not None:
            self.bias_E = self._update(self.bias_E, layer_counts, self._settings.rate_at(len(self.max_vio)))
        self.max_vio.append(float(max_vio(layer_counts.load_E)))
        self.experts_a_token.append(int(layer_counts.load_E.sum()) / tokens)
