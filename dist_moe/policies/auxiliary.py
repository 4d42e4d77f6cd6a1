"""Balancing by an auxiliary loss alone."""

from typing import Literal

from pydantic import Field

from dist_moe.errors import Violation
from dist_moe.policies.base import Policy, RoutingValues


class Auxiliary(Policy):
    """The balance loss of `auxiliary_loss` and `auxiliary_scope`, which every other policy may add too."""

    policy: Literal["auxiliary"] = Field(default="auxiliary", description="a loss; arXiv 2101.03961")

    def violations(self, routing: RoutingValues) -> list[Violation]:
        """Refuse a coefficient of 0, which would be no balancing under the name of one."""
        if self.auxiliary_loss:
            return []
        rule = f"leaves balance.policy={self.policy} without a loss"
        return [Violation("balance.auxiliary_loss", 0.0, rule, "give a coefficient above 0, such as 0.01")]
