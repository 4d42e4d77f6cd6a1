"""Blocks that select the experts themselves, from the logits of a linear layer (Jamba): their routers then select."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from dist_moe.probe.in_place import InPlace, change_class, has_own_forward
from dist_moe.probe.layers import FoundLayer

METHOD = "route_tokens_to_experts"
"""Of a block of transformers: (hidden states, logits) -> (ids, gate weights)."""


class SelectingLinear(InPlace):
    """A linear layer that returns (logits, gate weights, ids) of the experts, as the routers of other families do.

    Attributes:
        selection: That of its block.
    """

    selection: "Selection"

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select the experts of the tokens."""
        logits_TE = super().forward(hidden)
        ids_TK, weights_TK = self.selection(hidden, logits_TE)
        return logits_TE, weights_TK, ids_TK


class Selection:
    """The selection of a block, with its settings and without its modules.

    Args:
        block: The block.
    """

    def __init__(self, block: nn.Module) -> None:
        self._function = getattr(type(block), METHOD)
        self._settings = SimpleNamespace(
            **{name: value for name, value in vars(block).items() if not name.startswith("_")}
        )

    def __call__(self, hidden: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return (ids, gate weights)."""
        ids_TK, weights_TK = self._function(self._settings, hidden, logits_TE)
        return ids_TK, weights_TK


def selected(hidden: Tensor, routed: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (ids, gate weights) of a router that has selected: what a block's own selection returns."""
    _, weights_TK, ids_TK = routed
    return ids_TK, weights_TK


def move_selection(layer: FoundLayer) -> None:
    """Let the router of a layer select where its block does, in place. Blocks of other kinds stay as they are."""
    router: Any = layer.router
    is_linear = isinstance(router, nn.Linear) and type(router).forward is nn.Linear.forward
    if is_linear and has_own_forward(router) and callable(getattr(type(layer.block), METHOD, None)):
        change_class(router, SelectingLinear, selection=Selection(layer.block))
        setattr(layer.block, METHOD, selected)
