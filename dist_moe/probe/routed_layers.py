"""Finds the MoE layers of a model, and lets those whose block does a part of the routing be called as others are."""

from torch import nn

from dist_moe.probe.block_selection import move_selection
from dist_moe.probe.layers import FoundLayer, find_layers
from dist_moe.probe.weighted_inputs import take_experts


def find_routed_layers(model: nn.Module) -> list[FoundLayer]:
    """Find the MoE layers of a model, in its order.

    Their routers then return logits, gate weights and ids, and their experts are called with (hidden states, ids, gate
    weights), unless a block is of a kind that is not known. Where that was otherwise, the classes of modules are
    changed in place; what the model computes, and its names and tensors, stay the same.

    Args:
        model: Of any class, without the wrappers of other frameworks.

    Raises:
        UserError: The model has no experts, or experts without a router next to them.
    """
    layers = find_layers(model)
    for layer in layers:
        move_selection(layer)
        take_experts(layer)
    return layers
