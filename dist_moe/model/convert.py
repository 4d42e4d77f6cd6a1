"""Conversion of a Hugging Face model: the router and the experts of each MoE block are replaced."""

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.model import KernelsName
from dist_moe.families.record import Family, FeedForward
from dist_moe.model.early_call import EarlyCall
from dist_moe.model.upcycled_block import UpcycledBlock, make_experts, replace_feed_forward
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.moe.select import Rule

Activation = Callable[[Tensor], Tensor]


class MoeLayer(NamedTuple):
    """One converted block.

    Attributes:
        name: Module name of the block in the model.
        router: Its router.
        experts: Its experts.
    """

    name: str
    router: Router
    experts: ExpertParallelLayer


def convert(model: nn.Module, family: Family, rule: Rule, mesh: Mesh, kernels: KernelsName = "auto") -> list[MoeLayer]:
    """Replace router and experts of every MoE block of a model, in place; of a dense one, the feed-forward networks.

    On a model on the meta device this allocates nothing. Afterwards the model has the parameters of this rank's
    experts only.

    Args:
        model: A Hugging Face model of the family.
        family: Where its blocks keep router and experts.
        rule: How tokens select experts.
        mesh: Which rank holds which experts.
        kernels: The implementations on a GPU, as `model.moe_kernels` names them.

    Returns:
        The layers in the model's order.

    Raises:
        ValueError: The model has no MoE block, or the mesh does not divide its experts.
    """
    if family.feed_forward is not None:
        return _convert_dense(cast(PreTrainedModel, model), family, family.feed_forward, rule, mesh, kernels)
    blocks = [(name, block) for name, block in model.named_modules() if type(block).__name__ == family.block]
    if not blocks:
        raise ValueError(
            f"the {family.architecture} model has no {family.block}: all layers of its config are dense; change the "
            "keys of model.config that select the MoE layers"
        )
    return [_convert_block(name, block, family, rule, mesh, kernels) for name, block in blocks]


def find_layers(model: nn.Module) -> list[MoeLayer]:
    """Return the converted layers of a model, in its order."""
    modules = dict(model.named_modules())
    return [
        MoeLayer(name.rpartition(".")[0], _sibling_router(modules, name), layer)
        for name, layer in modules.items()
        if isinstance(layer, ExpertParallelLayer)
    ]


def _sibling_router(modules: dict[str, nn.Module], experts_name: str) -> Router:
    block = modules[experts_name.rpartition(".")[0]]
    return next(child for child in block.children() if isinstance(child, Router))


def _convert_block(
    name: str, block: nn.Module, family: Family, rule: Rule, mesh: Mesh, kernels: KernelsName
) -> MoeLayer:
    original = block.get_submodule(family.experts)
    experts, double_width, width = original.get_parameter("gate_up_proj").shape
    with original.get_parameter("gate_up_proj").device:
        router = Router(experts, width, rule)
        local = GroupedExperts(
            len(mesh.local_experts(experts)), width, double_width // 2, cast(Activation, original.act_fn), kernels
        )
        shared = None if family.shared_expert is None else EarlyCall(block.get_submodule(family.shared_expert))
        layer = ExpertParallelLayer(local, experts, mesh, shared, kernels)
    setattr(block, family.router, router)
    setattr(block, family.experts, layer)
    return MoeLayer(name, router, layer)


def _convert_dense(
    model: PreTrainedModel, family: Family, feed_forward: FeedForward, rule: Rule, mesh: Mesh, kernels: KernelsName
) -> list[MoeLayer]:
    """Replace the feed-forward networks of the layers that the config of a dense model names."""
    experts: int = getattr(model.config, family.experts_key)
    names = {id(module): name for name, module in model.named_modules()}
    layers = model.base_model.get_submodule(feed_forward.layers)
    converted = []
    for index in family.moe_layers(model.config):
        layer = layers.get_submodule(str(index))
        with next(layer.parameters()).device:
            local = make_experts(layer, feed_forward, len(mesh.local_experts(experts)), kernels)
            router = Router(experts, model.config.hidden_size, rule)
            block = UpcycledBlock(router, ExpertParallelLayer(local, experts, mesh, kernels=kernels))
        replace_feed_forward(layer, feed_forward, block)
        converted.append(MoeLayer(f"{names[id(layer)]}.{feed_forward.block}", router, block.experts))
    return converted
