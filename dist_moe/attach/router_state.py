"""The state of a layer whose router is of this package: that of the router itself.

Shapes: E experts.
"""

import torch
from torch import Tensor

from dist_moe.attach.state import FrozenState
from dist_moe.config.combinations import refusal
from dist_moe.errors import UserError
from dist_moe.model.routing import with_policy
from dist_moe.moe.router import Router
from dist_moe.moe.select import ExpertThreshold, Rule, ThresholdRouting, TopK
from dist_moe.policies.base import Policy, RoutingValues
from dist_moe.probe.layers import FoundLayer
from dist_moe.probe.router_probe import BiasPlace, Places, Probed


class RouterState:
    """A layer as the balancer sees it, as `LayerState`; the tensors are the buffers of the router.

    Args:
        layer: The layer in the model.
        router: Its router.

    Attributes:
        layer: The layer in the model.
        router: Its router.
        selects: Whether the results of the router are selected again: never.
    """

    def __init__(self, layer: FoundLayer, router: Router) -> None:
        if any(hasattr(parameter, "ds_id") for parameter in router.parameters()):
            raise UserError(
                f"{layer.name}: ZeRO 3 has partitioned the weights of the router, which this package reads whole; use "
                "stage 2 after dist_moe.route"
            )
        self.layer, self.router, self.selects = layer, router, False

    @property
    def probed(self) -> Probed:
        """What the router computes."""
        rule = self.router.rule
        known = rule if isinstance(rule, TopK) else None
        columns = self.router.max_experts_per_token
        bias: BiasPlace | None = None if self.router.is_fixed else "own"
        reason = "its experts do not depend on the hidden states, so that no bias moves them" if bias is None else ""
        return Probed(self.router.num_experts, columns, Places(0, 1, 2), known, bias, reason)

    @property
    def selection_bias(self) -> Tensor:
        """[E] fp32."""
        return self.router.selection_bias

    @property
    def last_load(self) -> Tensor:
        """[E] int64, of the last step."""
        return self.router.last_load

    @property
    def threshold(self) -> Tensor | None:
        """A scalar; None without threshold routing."""
        return self.router.threshold

    @property
    def is_balanced(self) -> bool:
        """Whether the balancer changes the bias: not that of a frozen router."""
        return self.router.is_balanced

    @property
    def max_experts_per_token(self) -> int:
        """The largest number of experts a token takes."""
        return self.router.max_experts_per_token

    @property
    def top_k(self) -> int | None:
        """Experts a token takes; None if the rule does not say."""
        return self.router.top_k

    @property
    def may_take_none(self) -> bool:
        """Whether a token may take no expert."""
        return self.router.may_take_none

    def follow(self, policy: Policy) -> None:
        """Apply the bias as a policy does.

        Raises:
            UserError: The policy does not work with the selection of the router.
        """
        rule, name = self.router.rule, self.layer.name
        selection = _selection_of(rule)
        routing = RoutingValues(
            selection, rule.score, self.router.top_k or 0, _groups_of(rule), self.router.num_experts
        )
        refused = refusal(selection, rule.score, policy.name())
        if refused is not None:
            raise UserError(f"policy={policy.name()} of {name}, selection={selection}: it {refused.rule}")
        if violations := policy.violations(routing):
            broken = violations[0]
            raise UserError(f"{name}: {broken.key}={broken.value} {broken.rule}; {broken.remedy}")
        if policy.moves_bias:  # or a bias that is there acts as it did
            self.router.rule = with_policy(rule, policy)

    def to(self, device: torch.device) -> None:
        """Move nothing: the buffers move with the model."""

    def read_sharded(self) -> None:
        """Read nothing: the buffers are whole."""

    def adopt(self) -> None:
        """Read nothing: the buffers are those of the model."""

    def write(self) -> None:
        """Write nothing: the buffers are those of the model."""

    def frozen(self) -> FrozenState:
        """Return what a copy of the model needs of this: nothing but the router."""
        return FrozenState(self.probed, self.selection_bias.detach().clone(), selects=False)


def _selection_of(rule: Rule) -> str:
    if isinstance(rule, ThresholdRouting):
        return "threshold"
    return "expert_threshold" if isinstance(rule, ExpertThreshold) else "top_k"


def _groups_of(rule: Rule) -> int:
    return rule.groups if isinstance(rule, TopK) else 1
