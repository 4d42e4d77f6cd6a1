"""Build a model: Hugging Face config -> model on the meta device -> local experts only -> initial values."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.model import AttentionName, KernelsName, NormName
from dist_moe.config.sections.router import RouterConfig
from dist_moe.errors import UserError
from dist_moe.families.model_class import model_class
from dist_moe.families.registry import family_of
from dist_moe.model.attention import attention_name
from dist_moe.model.convert import MoeLayer, convert, find_layers, recorded_rule
from dist_moe.model.family.experts import FamilyExperts
from dist_moe.model.family.hash_router import HashRouter
from dist_moe.model.family.router import FamilyRouter
from dist_moe.model.head import HEAD, attach_head, has_head
from dist_moe.model.norm import fuse_norms
from dist_moe.model.routing import with_policy
from dist_moe.moe.experts import BiasedExperts
from dist_moe.moe.router import Router
from dist_moe.moe.select import ExpertThreshold, RandomRouting, Rule, ThresholdRouting, TopK
from dist_moe.policies.base import Policy
from dist_moe.scores import Score
from dist_moe.text import listed

INITIALIZER_RANGE = 0.02
"""Standard deviation of the initial weights of experts, where the config class of a family does not say it."""


def build_model(
    architecture: str,
    model_config: Mapping[str, Any],
    rule: Rule | Score,
    mesh: Mesh,
    seed: int,
    attention: AttentionName = "auto",
    norm: NormName = "auto",
    moe_kernels: KernelsName = "auto",
) -> PreTrainedModel:
    """Build a model with initial values on the CPU, in fp32, with the experts of this rank only.

    Every initial value depends on `seed`, the name of its module and, for experts, the global id of the expert, and
    not on the layout.

    Args:
        architecture: Hugging Face's `model_type`.
        model_config: Keyword arguments of the Hugging Face config class.
        rule: How tokens select experts; or the name of a gate function, for the top-K rule of `model_config`.
        mesh: Which rank holds which experts.
        seed: Of the initial values.
        attention: The implementation of attention, as `model.attention` names it.
        norm: That of RMSNorm, as `model.norm` names it.
        moe_kernels: Those of the MoE layers on a GPU, as `model.moe_kernels` names them.
    """
    config = AutoConfig.for_model(architecture, **model_config)
    rule = family_rule(config, rule) if isinstance(rule, str) else rule
    model = empty_model(config, rule, mesh, attention, norm, moe_kernels)
    if "pad_token_id" not in model_config:  # some classes cannot be without one, which is then an ordinary token
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None
    materialize(model)
    initialize(model, seed)
    return model


def empty_model(
    config: PretrainedConfig,
    rule: Rule,
    mesh: Mesh,
    attention: AttentionName = "auto",
    norm: NormName = "auto",
    moe_kernels: KernelsName = "auto",
) -> PreTrainedModel:
    """Build the converted model on the meta device: shapes without memory."""
    family = family_of(config.model_type)
    kind = model_class(config, family.encoder)
    config._attn_implementation = _attention_of(kind) if family.is_probed else attention_name(attention)
    with torch.device("meta"):
        model: Any = kind._from_config(config, dtype=torch.float32)
        if has_head(config):
            attach_head(model)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # of an encoder: nothing here reads its result
    convert(model, family, rule, mesh, moe_kernels)
    for name, module in model.named_modules():
        if name.endswith(family.untrained) and family.untrained:
            module.requires_grad_(False)  # or weight decay alone would change it
    if norm == "auto":
        fuse_norms(model)
    return model


def _attention_of(kind: Any) -> str:
    """Return the implementation of a class of any family: that of transformers, which has all kinds of scores."""
    return "sdpa" if kind._supports_sdpa else "eager"


def family_rule(config: PretrainedConfig, score: Score) -> TopK:
    """Read the top-K rule of a Hugging Face config, with the gate function `score`."""
    family = family_of(config.model_type)
    rule = recorded_rule(family, config)
    return replace(rule, score=score, bias_on_probabilities=rule.bias_on_probabilities and score == "softmax")


def routing_rule(router: RouterConfig, policy: Policy, architecture: str) -> Rule:
    """The rule of a resolved configuration.

    Args:
        router: With every field filled.
        policy: The balancing policy, which may apply the bias in its own way.
        architecture: Of the model.

    Raises:
        RuntimeError: A field of `router` is not filled.
    """
    score, top_k, normalize, routed_scaling_factor = router.score, router.top_k, router.normalize, router.scaling_factor
    if score is None or top_k is None or normalize is None or routed_scaling_factor is None:
        raise RuntimeError("router.* is not resolved; load the config through dist_moe.config.resolve")
    if router.selection in ("threshold", "expert_threshold"):
        max_experts = router.max_experts
        if max_experts is None:
            raise RuntimeError("router.max_experts is not resolved; load the config through dist_moe.config.resolve")
        if router.selection == "expert_threshold":
            return ExpertThreshold(top_k, max_experts, router.min_experts, score, normalize, routed_scaling_factor)
        return with_policy(ThresholdRouting(router.threshold, max_experts, normalize, routed_scaling_factor), policy)
    if router.selection != "top_k":
        return RandomRouting(
            top_k, router.zipf_exponent if router.selection == "zipf" else 0.0, score, normalize, routed_scaling_factor
        )
    groups, topk_groups = router.groups or 1, router.topk_groups or 1
    family = family_of(architecture)
    rule = TopK(
        *(top_k, score, normalize, routed_scaling_factor, groups, topk_groups),
        group_score=family.group_score,
        bias_on_probabilities=family.bias_on_probabilities and score == "softmax",
    )
    return with_policy(rule, policy)


def materialize(model: PreTrainedModel) -> None:
    """Allocate the memory of a model on the meta device, tie its weights, and compute its non-persistent buffers.

    Parameters and persistent buffers are left uninitialized, for `initialize` or a loader.
    """
    model.to_empty(device="cpu")
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, Router):
            module.reset_state()
            continue
        # Rotary tables are not persistent, so no file holds them: the class's own initialization computes them.
        if module._non_persistent_buffers_set:
            model._init_weights(module)


def _persistent_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int) -> None:
    """Write the initial values that the model's class defines; each module and expert has a generator of its own.

    Raises:
        UserError: The class does not define all of them.
    """
    layers = find_layers(model)
    stored = [*model.parameters(), *_persistent_buffers(model)]
    for tensor in stored:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    ours = {id(part) for layer in layers for part in (layer.router, layer.experts, layer.experts.local)}
    blocks = {layer.name for layer in layers}
    for name, module in model.named_modules():
        if id(module) not in ours:
            # Some classes write the experts of a block, which are replaced; what is then without values is found below.
            replaced = contextlib.suppress(AttributeError) if name in blocks else contextlib.nullcontext()
            with torch.random.fork_rng(devices=[]), replaced:
                torch.manual_seed(derived_seed(seed, name))
                model._init_weights(module)
    for layer in layers:
        _initialize_layer(layer, getattr(model.config, "initializer_range", INITIALIZER_RANGE), seed)
    missing = [
        name for name, tensor in model.state_dict().items() if tensor.is_floating_point() and tensor.isnan().any()
    ]
    if missing:
        raise UserError(
            f"the class {type(model).__name__} of transformers has no initial values for {listed(missing, most=3)}; "
            "start from the weights of a folder, with model.pretrained"
        )


def _initialize_layer(layer: MoeLayer, std: float, seed: int) -> None:
    # The weights of a family's own router have the values of its class, if that defines them.
    if not isinstance(layer.router, FamilyRouter) or bool(layer.router.matrix.isnan().any()):
        _fill_normal(layer.router.matrix, std, derived_seed(seed, f"{layer.name}.router"))
    layer.router.reset_state()
    if isinstance(layer.router, HashRouter):
        layer.router.draw_table(derived_seed(seed, f"{layer.name}.table"))
    mesh, local = layer.experts.mesh, layer.experts.local
    for index, expert in enumerate(mesh.local_experts(layer.experts.num_experts)):
        for name, stacked in local.named_parameters():
            if stacked.ndim == 2:  # biases
                stacked[index].zero_()
                continue
            kind = name.removesuffix("_proj")
            _fill_normal(stacked[index], std, derived_seed(seed, f"{layer.name}.expert.{expert}.{kind}"))


def _fill_normal(tensor: Tensor, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def derived_seed(seed: int, name: str) -> int:
    """Derive a seed in [0, 2**63) from `seed` and `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def freeze_layers(model: PreTrainedModel, count: int) -> None:
    """Exclude what a model computes before its layer `count` from training: the embeddings and the layers before it.

    They have no backward pass, and their parameters are not in the optimizer. An output layer that is tied to the
    embeddings is not trained, either.

    Args:
        model: With its layers in one list, and its final norm as the only module with weights that reads their result.
        count: The first layer that is trained; 0: all of the model is.

    Raises:
        UserError: Other modules come after the layers, of which it is not known what they read.
    """
    if not count:
        return
    base, depth = model.base_model, model.config.num_hidden_layers
    lists = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    layers = next(name for name, module in lists.items() if len(module) == depth)
    owner = base.get_submodule(layers.rpartition(".")[0])
    children = list(owner.named_children())
    place = [name for name, _ in children].index(layers.rpartition(".")[2])
    # The head, which is below the model itself where that is the base model, reads the result of the final norm.
    later = [(name, child) for name, child in children[place + 1 :] if child is not getattr(model, HEAD, None)]
    after = [(name, child) for name, child in later if any(True for _ in child.parameters())]
    if unknown := [name for name, child in after if "norm" not in name and not isinstance(child, nn.Embedding)]:
        raise UserError(
            f"train.frozen_layers={count} is not possible with a {model.config.model_type}: its {unknown[0]} comes "
            "after the layers, and may be read by all of them; set it to 0"
        )
    first_trained = f"{layers}.{count}."
    for name, parameter in base.named_parameters():
        if name.startswith(first_trained):
            break
        parameter.requires_grad_(False)
    for _, child in after:
        if isinstance(child, nn.Embedding):
            child.requires_grad_(False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Make optimizer groups {"name", "params", "weight_decay"}: no decay on norms, biases and embeddings."""
    without_decay = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    experts = (module for module in model.modules() if isinstance(module, BiasedExperts | FamilyExperts))
    without_decay |= {id(bias) for module in experts for name, bias in module.named_parameters() if "bias" in name}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or id(parameter) in without_decay else decayed).append(parameter)
    return [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]
