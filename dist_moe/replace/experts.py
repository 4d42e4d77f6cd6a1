"""Puts the experts of this package in the place of those of a model, with their values."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_moe.comm.mesh import Mesh
from dist_moe.errors import UserError
from dist_moe.model.convert import make_local
from dist_moe.model.family.experts import check_experts
from dist_moe.moe.experts import Experts
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.probe.layers import FoundLayer, expert_groups, inner_model, replace_child
from dist_moe.probe.own_bias import OwnBias, find_own_bias
from dist_moe.probe.routed_layers import unify_layers
from dist_moe.probe.router_probe import Probed, probe_router

HELD = "held"
"""The name of a buffer below distributed experts: the ids of the first one of this rank, and after its last one."""


class ReadLayer:
    """An MoE layer of a model whose routing is known.

    Args:
        layer: As found.
        model: The model.

    Attributes:
        layer: As found.
        own: The selection bias of the family; None without one.
        probed: What the router computes.
    """

    def __init__(self, layer: FoundLayer, model: nn.Module) -> None:
        self.layer = layer
        self.own: OwnBias | None = find_own_bias(layer)
        try:
            self.probed: Probed = probe_router(layer, self.own, expert_groups(model))
        except UserError as error:
            raise UserError(
                f"{layer.name} ({type(layer.router).__name__}): {error}; the model computes the same as before"
            ) from None
        if not self.is_placed:
            self._check_experts()

    @property
    def is_placed(self) -> bool:
        """Whether its experts are of this package already."""
        return isinstance(self.layer.experts, Experts)

    def place_experts(self, mesh: Mesh) -> None:
        """Replace the experts by those of this rank, which take over their values, in place."""
        original = self.layer.experts
        held = mesh.local_experts(self.probed.num_experts)
        with torch.device("meta"):
            local = make_local(original, len(held), "auto")
            placed = ExpertParallelLayer(local, self.probed.num_experts, mesh)
        for weight, parameter in original.named_parameters():
            local.register_parameter(weight, _part(parameter, held))
        placed.train(original.training)
        replace_child(self.layer, original, placed)

    def _check_experts(self) -> None:
        """Refuse experts that compute something unknown, or that are inside of a wrapper."""
        original = self.layer.experts
        try:
            check_experts(original, lambda module, experts: make_local(module, experts, "auto"))
        except Exception as error:  # modules of another library raise errors of any type
            raise UserError(f"{self.layer.name}: {error}; the model computes the same as before") from error
        for part in (self.layer.router, original):
            if all(child is not part for child in self.layer.block.children()):
                raise UserError(
                    f"the {type(part).__name__} of {self.layer.name} is inside of a wrapper, such as that of an "
                    "adapter; replace it before the wrapper is made"
                )


def read_layers(model: nn.Module) -> list[ReadLayer]:
    """Find the MoE layers of a model, and what their routers compute.

    Raises:
        UserError: One is not known, or the model is in a wrapper, sharded, on the meta device or quantized.
    """
    _check_whole(model)
    return [ReadLayer(layer, model) for layer in unify_layers(model)]


def mark_held(name: str, layer: ExpertParallelLayer) -> None:
    """Store in the state of a layer which experts it has, and refuse the state of a rank with others.

    Raises:
        UserError: By `load_state_dict`, as of a checkpoint that one rank has written.
    """
    held = layer.mesh.local_experts(layer.num_experts)
    device = next(layer.parameters()).device
    layer.register_buffer(HELD, torch.tensor([held.start, held.stop], device=device))

    def check(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        stored = state.get(prefix + HELD)
        if stored is not None and stored.tolist() != [held.start, held.stop]:
            first, end = stored.tolist()
            raise UserError(
                f"the state of {name} has the experts {first} to {end - 1}, and this rank holds {held.start} to "
                f"{held.stop - 1}; save and load the state of each rank, or use dist_moe.save_pretrained"
            )

    layer.register_load_state_dict_pre_hook(check)


def placed_layers(model: nn.Module) -> dict[str, ExpertParallelLayer]:
    """Return the experts of this package in a model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertParallelLayer)}


def local_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of this rank's experts, with their names."""
    for name, layer in placed_layers(model).items():
        for weight, parameter in layer.named_parameters():
            yield f"{name}.{weight}" if name else weight, parameter


def _part(parameter: nn.Parameter, held: range) -> nn.Parameter:
    """Return the weights of some experts: the parameter itself where these are all."""
    if len(held) == len(parameter):
        return parameter
    return nn.Parameter(parameter.detach()[held.start : held.stop].clone(), parameter.requires_grad)


def _check_whole(model: nn.Module) -> None:
    if inner_model(model) is not model:
        raise UserError(
            f"the model is inside of a {type(model).__name__}, which knows its present parameters; replace its layers "
            "before the wrapper is made"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise UserError(f"{name} is sharded; replace the layers of the model before it is sharded")
        if parameter.is_meta:
            raise UserError(
                f"{name} is on the meta device, without values; load the model, or use dist_moe.from_pretrained"
            )
        if not parameter.is_floating_point():
            raise UserError(f"{name} is {parameter.dtype}: the model is quantized; use its weights in bf16 or fp32")
