"""The state of a layer: how its routing is read, and how a bias reaches its selection.

Shapes: T tokens, E experts, K experts a token takes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.moe.select import select
from dist_moe.policies.base import Policy, RoutingValues
from dist_moe.probe.layers import FoundLayer
from dist_moe.probe.own_bias import find_own_bias
from dist_moe.probe.router_probe import Probed, probe_router, read_results
from dist_moe.probe.router_rule import Groups
from dist_moe.scores import OVER_LOGITS

LOSSES = ("auxiliary_loss", "z_loss", "orthogonality_loss")
"""Fields of policies with the coefficient of a loss."""


class LayerState:
    """What the balancer stores of a layer, in fp32 for a model of any precision; a `BalancedRouter`.

    Args:
        layer: The layer in the model.
        groups: Of the configuration of the model.

    Attributes:
        layer: The layer in the model.
        probed: What its router computes.
        selection_bias: [E] fp32, the bias that the updates add to.
        last_load: [E] int64, of the last step.
        selects: Whether the results of the router are selected again.
        threshold: None; a router that is kept has none.

    Raises:
        UserError: The routing of the layer cannot be read.
    """

    threshold: Tensor | None = None

    def __init__(self, layer: FoundLayer, groups: Groups = (1, 1)) -> None:
        self.layer = layer
        own = find_own_bias(layer)
        try:
            self.probed = probe_router(layer, own, groups)
        except UserError as error:
            raise UserError(
                f"{layer.name} ({type(layer.router).__name__}): {error}; its load cannot be counted"
            ) from None
        self._own = own if self.probed.bias == "own" else None
        start = None if self._own is None else self._own.read()
        self.selection_bias = torch.zeros(self.probed.num_experts) if start is None else start
        self.last_load = torch.zeros(self.probed.num_experts, dtype=torch.int64)
        self.selects = False

    @property
    def is_balanced(self) -> bool:
        """Whether the balancer changes the bias."""
        return self.probed.bias is not None

    @property
    def max_experts_per_token(self) -> int:
        """Experts a token takes."""
        return self.probed.top_k

    @property
    def top_k(self) -> int | None:
        """Experts a token takes."""
        return self.probed.top_k

    @property
    def may_take_none(self) -> bool:
        """Whether a token may take no expert."""
        return False

    def to(self, device: torch.device) -> None:
        """Move the tensors."""
        self.selection_bias, self.last_load = self.selection_bias.to(device), self.last_load.to(device)

    def read_sharded(self) -> None:
        """Take the model's own bias where it is sharded, which `adopt` does not read. Collective."""
        if self._own is not None and self._own.unsharded() is None and (value := self._own.read()) is not None:
            self.selection_bias = value.to(self.selection_bias.device)

    def adopt(self) -> None:
        """Take the elements of the model's own bias that were changed since `write`, as by loading a checkpoint."""
        value = None if self._own is None else self._own.unsharded()
        if value is not None:
            unchanged = value == self.selection_bias.to(value.dtype)  # in the precision of the model
            self.selection_bias = torch.where(unchanged, self.selection_bias, value.float())

    def write(self) -> None:
        """Give the bias to the model, in the precision that it keeps it in."""
        if self._own is not None:
            self._own.write(self.selection_bias)

    def frozen(self) -> "FrozenState":
        """Return what a copy of the model needs of this: the bias of this moment."""
        return FrozenState(self.probed, self.selection_bias.detach().clone(), self.selects)


class FrozenState(NamedTuple):
    """The bias of a layer in a copy of the model.

    Attributes:
        probed, selection_bias, selects: As of `LayerState`.
    """

    probed: Probed
    selection_bias: Tensor
    selects: bool

    def frozen(self) -> "FrozenState":
        """Return a copy."""
        return self._replace(selection_bias=self.selection_bias.clone())


def select_again(state: LayerState | FrozenState, router: nn.Module, returned: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Replace the gate weights and ids of a router's results by those that it would give with the bias.

    Args:
        state: With a known rule, whose logits the router returns.
        router: For its factor of each expert.
        returned: By the router.
    """
    probed, places = state.probed, state.probed.places
    logits_TE = read_results(returned, places).logits_TE
    assert probed.rule is not None and logits_TE is not None
    routing = select(logits_TE.float(), probed.rule, state.selection_bias.to(logits_TE.device))
    weights_TK = routing.weights_TK
    if probed.expert_scale is not None:
        weights_TK = weights_TK * router.get_parameter(probed.expert_scale)[routing.ids_TK]
    replaced = list(returned)
    weights, ids = returned[places.weights], returned[places.ids]
    replaced[places.weights] = weights_TK.to(weights.dtype).view_as(weights)
    replaced[places.ids] = routing.ids_TK.to(ids.dtype).view_as(ids)
    return tuple(replaced)


def check_policy(policy: Policy, states: Sequence[Any]) -> None:
    """Refuse a policy that does not work with the routers of a model.

    Args:
        policy: The policy.
        states: Of the layers: `LayerState`, and `RouterState`, which checks the policy itself.

    Raises:
        UserError: It does not.
    """
    name = policy.name()
    if losses := [f"{field}={getattr(policy, field)}" for field in LOSSES if getattr(policy, field)]:
        raise UserError(f"{', '.join(losses)}: a loss belongs in the training loop; use a policy that moves a bias")
    if not policy.moves_bias:
        if name == "auxiliary":
            raise UserError(f"policy={name} is a loss, which belongs in the training loop; use one that moves a bias")
        return
    if not any(state.is_balanced for state in states):
        reason = f"{states[0].layer.name}: {states[0].probed.reason}"
        raise UserError(f"no layer can be balanced: {reason}; policy='none' counts the load")
    for state in states:
        if isinstance(state, LayerState) and state.is_balanced:
            _check_layer(policy, state)


def _check_layer(policy: Policy, state: LayerState) -> None:
    name, rule = state.layer.name, state.probed.rule
    if policy.needs_margins and rule is None:
        raise UserError(f"policy={policy.name()} reads the logits of {name}, whose rule is not known; use loss_free")
    if policy.bias_multiplies_scores or policy.bias_in_gate_weights:
        raise UserError(
            f"policy={policy.name()} with these fields changes the gate weights or multiplies the scores of {name}, "
            "whose router is kept; use its defaults"
        )
    if policy.bias_is_log_weight and (rule is None or rule.bias_on_probabilities or rule.score not in OVER_LOGITS):
        raise UserError(
            f"policy={policy.name()} moves weights on probabilities, and {name} does not add its bias to the logits of "
            "a softmax; use loss_free"
        )
    if rule is None:
        return
    if policy.refusal("top_k", rule.score) is not None:
        raise UserError(
            f"policy={policy.name()} does not work with top-K selection by the {rule.score} scores of {name}; use "
            "loss_free"
        )
    routing = RoutingValues("top_k", rule.score, rule.top_k, rule.groups, state.probed.num_experts)
    if violations := policy.violations(routing):
        broken = violations[0]
        raise UserError(f"{name}: {broken.key}={broken.value} {broken.rule}; use another policy, or other fields")
