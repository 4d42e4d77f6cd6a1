"""A router that computes its logits by the family's own module, and selects experts by a rule of this package.

Shapes: T tokens, D model width, E experts, K experts a token takes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.moe.records import Routing
from dist_moe.moe.router import Router
from dist_moe.moe.select import Rule
from dist_moe.probe.own_bias import OwnBias
from dist_moe.probe.router_probe import Probed, Results, read_results

ORIGINAL = "original"
"""The name of the family's own router below this one."""


class FamilyRouter(Router):
    """Routes tokens by a rule, from the logits of the family's own router.

    The family's router is called as its block calls it, in fp32 in a model of any precision; its gate weights and ids
    are replaced, in the place where it returns them.

    Args:
        original: The family's router, which becomes a child.
        probed: What it computes, with a known rule.
        rule: How tokens select experts.
        own: The selection bias of the family, in whose place this router has its own; it stays 0, and is not saved.
    """

    def __init__(self, original: nn.Module, probed: Probed, rule: Rule, own: OwnBias | None) -> None:
        nn.Module.__init__(self)
        self._add_state(probed.num_experts, rule)
        self.original = original
        self._probed = probed
        self._own = own
        if own is not None:
            zeros = torch.zeros_like(getattr(own.owner, own.name), requires_grad=False)
            delattr(own.owner, own.name)
            own.owner.register_buffer(own.name, zeros, persistent=False)

    def reset_state(self) -> None:
        """Write the initial values of the buffers, and 0 into the family's own bias."""
        super().reset_state()
        if self._own is not None:
            getattr(self._own.owner, self._own.name).zero_()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the family's router, which its block and its initialization may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(ORIGINAL), name)

    @property
    def family_bias(self) -> OwnBias | None:
        """As of `Router`."""
        return self._own

    @property
    def matrix(self) -> nn.Parameter:
        """The weights [E, D] of the logits."""
        return next(
            parameter
            for parameter in self.original.parameters()
            if parameter.ndim == 2 and len(parameter) == self.num_experts
        )

    def forward(self, hidden: Tensor, *others: Any, **named: Any) -> Any:
        """Route tokens; takes and returns what the family's router does."""
        places = self._probed.places
        with torch.autocast(hidden.device.type, enabled=False):
            returned, gate_logits = self._call_original(hidden, others, named)
            routing = self._route_results(read_results(returned, places, gate_logits))
        weights_TK = routing.weights_TK
        if self._probed.expert_scale is not None:
            scale_E = self.original.get_parameter(self._probed.expert_scale)
            weights_TK = weights_TK * scale_E[routing.ids_TK.clamp_min(0)]
        replaced = list(returned)
        for place, values_TK in ((places.weights, weights_TK.to(hidden.dtype)), (places.ids, routing.ids_TK)):
            replaced[place] = values_TK.reshape(*returned[place].shape[:-1], values_TK.shape[-1])
        return tuple(replaced)

    def _route_results(self, results: Results) -> Routing:
        """Select experts by the logits of the family's router."""
        assert results.logits_TE is not None
        return self._route(results.logits_TE)

    def _call_original(
        self, hidden: Tensor, others: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Call the family's router in fp32 or wider; return its results, and the logits of its child `gate`."""
        gate_logits: list[Tensor] = []
        gate = getattr(self.original, "gate", None) if self._probed.places.logits is None else None
        handle = gate and gate.register_forward_hook(lambda module, args, output: gate_logits.append(output))
        dtype = torch.promote_types(torch.float32, hidden.dtype)
        state = {**dict(self.original.named_parameters()), **dict(self.original.named_buffers())}
        wide = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        try:
            returned = torch.func.functional_call(self.original, wide, (hidden.to(dtype), *others), named)
        finally:
            if handle is not None:
                handle.remove()
        return returned, gate_logits[-1] if gate_logits else None
