"""Blocks that select the experts themselves, from the logits of a linear layer: the selection becomes the router's."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dist_moe.probe.layers import ROUTER_NAMES

METHOD = "route_tokens_to_experts"
"""Of a block of transformers: (hidden states, logits) -> (ids, gate weights)."""


class SelectingLinear(nn.Linear):
    """A linear layer that returns (logits, gate weights, ids) of the experts, as the routers of other families do."""

    def __init__(self, linear: nn.Linear, select: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._select = select

    def forward(self, hidden: Tensor) -> Any:
        """Select the experts of the tokens."""
        logits_TE = functional.linear(hidden, self.weight, self.bias)
        ids_TK, weights_TK = self._select(hidden, logits_TE)
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


def move_selection_to_routers(model: nn.Module) -> None:
    """Let the routers of a model select where its blocks do, in place; what the model computes stays the same.

    Names and tensors stay. Blocks of other kinds are left as they are.
    """
    for block in list(model.modules()):
        name = next((name for name in ROUTER_NAMES if type(getattr(block, name, None)) is nn.Linear), None)
        if name is not None and callable(getattr(type(block), METHOD, None)):
            setattr(block, name, SelectingLinear(block.get_submodule(name), Selection(block)))  # type: ignore[arg-type]
            setattr(block, METHOD, selected)
