"""The MoE block that takes the place of the feed-forward network of a dense model (sparse upcycling).

Komatsuzaki et al. 2022, arXiv 2212.05055: each expert starts as a copy of the network. Shapes: T tokens, D model width,
K experts a token takes.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from dist_moe.config.sections.model import KernelsName
from dist_moe.families.record import FeedForward
from dist_moe.moe.experts import BiasedExperts, Experts, GroupedExperts
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router


class UpcycledBlock(nn.Module):
    """Router and experts in the place of a feed-forward network, whose result they have while the experts are copies.

    Args:
        gate: The router.
        experts: The experts.

    Attributes:
        as_dense: Whether the first local expert computes every token, without an exchange; the router is called, and
            what it selects is not used.
    """

    def __init__(self, gate: Router, experts: ExpertParallelLayer) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.as_dense = False

    def forward(self, hidden_D: Tensor) -> Tensor:
        """Return the experts' results [..., D], summed with gate weights that sum to 1. Collective."""
        hidden_TD = hidden_D.reshape(-1, hidden_D.shape[-1])
        _, weights_TK, ids_TK = self.gate(hidden_TD)
        if self.as_dense:
            ends_e = torch.full(
                (len(self.experts.mesh.local_experts(self.experts.num_experts)),), len(hidden_TD), dtype=torch.int32
            )
            weights_T = hidden_TD.new_ones(len(hidden_TD))
            dense_TD: Tensor = self.experts.local(hidden_TD, weights_T, ends_e)
            return dense_TD.view_as(hidden_D)
        mixed_TD: Tensor = self.experts(hidden_TD, ids_TK, with_unit_sum(weights_TK))
        return mixed_TD.view_as(hidden_D)


def with_unit_sum(weights_TK: Tensor) -> Tensor:
    """Divide the gate weights of each token by their sum, which counts as a constant in the gradient.

    Then the block's result is that of the dense network under any rule of routing: probabilities of some of the experts
    sum to less than 1, and scaled or sigmoid weights to any number. The gradient of a weight is that of the given one,
    divided by the sum, so that one expert alone (top-1) has a gradient, which a normalized weight has not.

    Args:
        weights_TK: 0 in empty slots.
    """
    wide_TK = weights_TK.to(torch.promote_types(torch.float32, weights_TK.dtype))
    sum_T1 = wide_TK.detach().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(wide_TK.dtype).tiny)
    return (wide_TK / sum_T1).to(weights_TK.dtype)


def make_experts(layer: nn.Module, feed_forward: FeedForward, experts: int, kernels: KernelsName) -> Experts:
    """Make the experts of this rank in the shape of a layer's feed-forward network, without values.

    Args:
        layer: A layer of a dense model.
        feed_forward: Where its feed-forward network is.
        experts: Their number on this rank.
        kernels: The implementations on a GPU, as `model.moe_kernels` names them.

    Raises:
        ValueError: The network has other biases than the experts.
    """
    linears = {name: cast(nn.Linear, layer.get_submodule(path)) for name, path in feed_forward.projections.items()}
    activation = cast(Callable[[Tensor], Tensor], layer.get_submodule(feed_forward.activation))
    up, gated = linears["up_proj"], "gate_proj" in linears
    for name, linear in linears.items():
        if type(linear) is not nn.Linear or (linear.bias is None) is not gated:
            needed = "a linear layer without bias" if gated else "a linear layer with a bias"
            raise ValueError(
                f"{feed_forward.projections[name]} is not {needed}: its experts would compute another function"
            )
    if gated:
        return GroupedExperts(experts, up.in_features, up.out_features, activation, kernels)
    return BiasedExperts(experts, up.in_features, up.out_features, activation)


def replace_feed_forward(layer: nn.Module, feed_forward: FeedForward, block: UpcycledBlock) -> None:
    """Put the block in the place of the feed-forward network of a layer."""
    layer.set_submodule(feed_forward.block, block)
    for path in feed_forward.removed:
        layer.set_submodule(path, nn.Identity())
