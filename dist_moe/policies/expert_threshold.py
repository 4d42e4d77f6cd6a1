"""Expert thresholds: each expert takes the tokens whose logit is above its threshold.

After Expert Threshold, Sun et al. 2026, arXiv 2603.11535: the threshold of an expert is an exponential average of the
quantile of its logits that gives it its share of a batch, K / E of the tokens. A token is routed by its own logits and
by thresholds of earlier steps, so that routing is causal, and takes K experts on average: some tokens more, some fewer
or none. The full text of the paper was not available: this is a reconstruction from its abstract and from public
descriptions. The paper starts with steps of expert-choice routing, which is not causal; here tokens take their K
highest logits until the first update, whose quantile begins the average.

The selection bias is the negated threshold.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dist_moe.errors import Violation
from dist_moe.policies.base import Refusal, RoutingValues
from dist_moe.policies.ema_quantile import AverageQuantilePolicy


class ExpertThresholds(AverageQuantilePolicy):
    """A threshold on the logit of each expert, which gives it its share of the tokens."""

    policy: Literal["expert_threshold"] = Field(
        default="expert_threshold",
        description="a threshold for each expert, averaged over the steps, with router.selection=expert_threshold; "
        "arXiv 2603.11535",
    )

    center_by_default: ClassVar[bool] = False

    @classmethod
    def refusal(cls, selection: str, score: str) -> Refusal | None:
        """Refuse selections that read no thresholds."""
        if selection == "expert_threshold":
            return None
        return Refusal(
            "sets a threshold for each expert, which router.selection=expert_threshold alone reads",
            "set router.selection=expert_threshold, or use another balance.policy",
        )

    def violations(self, routing: RoutingValues) -> list[Violation]:
        """Refuse centered thresholds too, with which tokens would take another number of experts than K."""
        violations = super().violations(routing)
        if self.center:
            rule = "shifts all thresholds, and with them the number of experts that a token takes"
            violations.append(Violation("balance.center", True, rule, "leave it out"))
        return violations
