"""Conversion from outside: the router and the experts of each MoE block of a Hugging Face model are replaced."""

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor, nn

from dist_moe.comm.mesh import Mesh
from dist_moe.families.record import Family
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.moe.select import Rule

Activation = Callable[[Tensor], Tensor]


class MoeLayer(NamedTuple):
    """One converted block: its module name in the model, its router, and its experts."""

    name: str
    router: Router
    experts: ExpertParallelLayer


def convert(model: nn.Module, family: Family, rule: Rule, mesh: Mesh) -> list[MoeLayer]:
    """Replace router and experts of every MoE block of `model`, in place -> the layers in the model's order.

    On a model that lies on the meta device this allocates nothing, and afterwards the model has the parameters of
    this rank's experts alone. Errors: ValueError where no block is found, or experts do not divide by the mesh.
    """
    blocks = [(name, block) for name, block in model.named_modules() if type(block).__name__ == family.block]
    if not blocks:
        raise ValueError(
            f"the {family.architecture} model has no {family.block}; its config asks for dense layers only, so "
            "lower first_k_dense_replace or mlp_only_layers in model.config"
        )
    return [_convert_block(name, block, family, rule, mesh) for name, block in blocks]


def find_layers(model: nn.Module) -> list[MoeLayer]:
    """The converted layers of `model`, in its order."""
    modules = dict(model.named_modules())
    return [
        MoeLayer(name.rpartition(".")[0], _sibling_router(modules, name), layer)
        for name, layer in modules.items()
        if isinstance(layer, ExpertParallelLayer)
    ]


def _sibling_router(modules: dict[str, nn.Module], experts_name: str) -> Router:
    block = modules[experts_name.rpartition(".")[0]]
    return next(child for child in block.children() if isinstance(child, Router))


def _convert_block(name: str, block: nn.Module, family: Family, rule: Rule, mesh: Mesh) -> MoeLayer:
    theirs = block.get_submodule(family.experts)
    experts, double_width, width = theirs.get_parameter("gate_up_proj").shape
    with theirs.get_parameter("gate_up_proj").device:
        router = Router(experts, width, rule)
        local = GroupedExperts(
            len(mesh.local_experts(experts)), width, double_width // 2, cast(Activation, theirs.act_fn)
        )
        layer = ExpertParallelLayer(local, experts, mesh)
    setattr(block, family.router, router)
    setattr(block, family.experts, layer)
    return MoeLayer(name, router, layer)
