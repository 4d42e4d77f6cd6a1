"""Conversion of a Hugging Face model: the router and the experts of each MoE block are replaced."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.comm.mesh import Mesh
from dist_moe.config.model import DEFAULT_ROUTING
from dist_moe.config.sections.model import KernelsName
from dist_moe.errors import UserError
from dist_moe.families.record import Family, FeedForward
from dist_moe.model.early_call import EarlyCall
from dist_moe.model.family.experts import FamilyExperts, check_experts, is_swiglu
from dist_moe.model.family.hash_router import make_router
from dist_moe.model.upcycled_block import UpcycledBlock, make_experts, replace_feed_forward
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.moe.select import Rule, TopK
from dist_moe.probe.layers import expert_groups, replace_child
from dist_moe.probe.layers import find_layers as find_experts
from dist_moe.probe.own_bias import find_own_bias
from dist_moe.probe.routed_layers import unify_layers
from dist_moe.probe.router_probe import Probed, probe_router
from dist_moe.probe.router_rule import RELATIVE

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
        UserError: What the layers of a family compute differs from its record, or is not known.
    """
    if family.is_probed:
        return _convert_probed(cast(PreTrainedModel, model), family, rule, mesh, kernels)
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


def _convert_probed(
    model: PreTrainedModel, family: Family, rule: Rule, mesh: Mesh, kernels: KernelsName
) -> list[MoeLayer]:
    """Replace experts, and put a router around that of the family, in every layer that is found."""
    groups, converted = expert_groups(model), []
    recorded = recorded_rule(family, model.config)
    remove_unreached(model, family.untrained)
    for found in unify_layers(model):
        own = find_own_bias(found)
        try:
            probed = probe_router(found, own, groups)
            check_experts(found.experts, lambda original, experts: make_local(original, experts, kernels))
        except Exception as error:  # modules of another library raise errors of any type
            raise UserError(
                f"{found.name} of the {family.architecture} model cannot be trained: {error}; use another "
                "configuration, or a family of docs/families.md"
            ) from error
        experts = probed.num_experts
        with next(found.experts.parameters()).device:
            local = make_local(found.experts, len(mesh.local_experts(experts)), kernels)
            # A table has no rule that could be compared with the record.
            layer_rule = rule if probed.table else _rule_of_layer(family, found.name, rule, recorded, probed)
            router = make_router(found.router, probed, layer_rule, own)
            layer = ExpertParallelLayer(local, experts, mesh, kernels=kernels)
        for part, module in ((found.router, router), (found.experts, layer)):
            replace_child(found, part, module)
        converted.append(MoeLayer(found.name, router, layer))
    return converted


def remove_unreached(model: nn.Module, untrained: tuple[str, ...]) -> None:
    """Remove the MoE layers that no token of a text reaches: those for the images of a multimodal model."""
    for found in find_experts(model):
        if found.name.endswith(untrained):
            owner, _, name = found.name.rpartition(".")
            setattr(model.get_submodule(owner), name, None)


def _rule_of_layer(family: Family, name: str, rule: Rule, recorded: TopK, probed: Probed) -> Rule:
    """Return the rule of a layer: that of the run, with what the layer's own router has of its own.

    Raises:
        UserError: The router computes something else than the record of the family says.
    """
    own = probed.rule
    same = own is not None and math.isclose(own.routed_scaling_factor, recorded.routed_scaling_factor, rel_tol=RELATIVE)
    fitted = recorded.top_k, recorded.routed_scaling_factor
    if own is None or not same or replace(own, top_k=fitted[0], routed_scaling_factor=fitted[1]) != recorded:
        raise UserError(
            f"{name} of the {family.architecture} model routes by {own or probed.reason}, which differs from the "
            f"{recorded} of its configuration; use another version of transformers, or another configuration"
        )
    if isinstance(rule, TopK) and rule.top_k == recorded.top_k:
        return replace(rule, top_k=own.top_k)  # some families have a number for each layer
    return rule


def recorded_rule(family: Family, config: Any) -> TopK:
    """Return the top-K rule that a configuration of Hugging Face asks for."""

    def value(key: str | None, default: Any) -> Any:
        return default if key is None else getattr(config, key)

    normalize = family.defaults.get("normalize", DEFAULT_ROUTING["normalize"])
    return TopK(
        top_k=value(family.top_k_key, None),
        score=family.score,
        normalize=bool(value(family.normalize_key, normalize)),
        routed_scaling_factor=float(value(family.scaling_factor_key, family.default_factor(config))),
        groups=int(value(family.groups_key, 1) or 1),
        topk_groups=int(value(family.topk_groups_key, 1) or 1),
        group_score=family.group_score,
        bias_on_probabilities=family.bias_on_probabilities,
    )


def make_local(original: nn.Module, experts: int, kernels: KernelsName) -> GroupedExperts | FamilyExperts:
    """Make the experts of a rank, without values, that compute what a family's own module does."""
    if not is_swiglu(original):
        return FamilyExperts(original, experts)
    _, double_width, width = original.get_parameter("gate_up_proj").shape
    return GroupedExperts(experts, width, double_width // 2, cast(Activation, original.act_fn), kernels)


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
