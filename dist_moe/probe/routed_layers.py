"""The common form of MoE layers, into which those whose block does a part of the routing are brought in place."""

from torch import nn

from dist_moe.probe.block_selection import move_selection
from dist_moe.probe.layers import FoundLayer, find_layers
from dist_moe.probe.weighted_inputs import exchange_selected_experts


def unify_layers(model: nn.Module) -> list[FoundLayer]:
    """Bring the MoE layers of a model into the common form, and return them in its order.

    In that form a router returns logits, gate weights and ids, and experts are called with (hidden states, ids, gate
    weights). Modules of other layers get other classes, in place; what the model computes, and its names and tensors,
    stay the same. Blocks of an unknown kind are not changed.

    Args:
        model: Of any class, without the wrappers of other frameworks.

    Raises:
        UserError: The model has no experts, or experts without a router next to them.
    """
    layers = find_layers(model)
    for layer in layers:
        move_selection(layer)
        exchange_selected_experts(layer)
    return layers
