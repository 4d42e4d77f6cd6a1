"""Finds the MoE layers of any Hugging Face model, in any wrapper: its experts, and the router next to them."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dist_moe.errors import UserError
from dist_moe.text import listed

ROUTER_NAMES = ("gate", "router", "classifier")
"""Of a router among the children of the module that holds the experts."""
LEVELS = 3
"""How far above the experts the router may be."""
MARKS = ("has_gate", "is_transposed")
"""Attributes that transformers gives to an experts module whose implementation can be chosen."""


class FoundLayer(NamedTuple):
    """An MoE layer.

    Attributes:
        name: Module name of what holds the router and the experts.
        block: That module.
        router: The router.
        experts: The experts.
    """

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module


def find_layers(model: nn.Module) -> list[FoundLayer]:
    """Find the MoE layers of a model, in its order.

    Args:
        model: Of any class, without the wrappers of other frameworks.

    Raises:
        UserError: The model has no experts, or experts without a router next to them.
    """
    modules = dict(model.named_modules())
    layers: dict[str, FoundLayer] = {}
    for name, experts in modules.items():
        if not is_experts(experts, name, modules):
            continue
        block_name, router = _find_router(name, modules)
        if router is None:
            raise UserError(
                f"{name} has no router next to it (a child named {listed(ROUTER_NAMES)}); the routing of these experts "
                "cannot be read"
            )
        layers.setdefault(block_name, FoundLayer(block_name, modules[block_name], router, experts))
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no MoE layer (no module with stacked experts); give a model with experts, "
            "or its inner model"
        )
    return list(layers.values())


def replace_child(layer: FoundLayer, part: nn.Module, module: nn.Module) -> None:
    """Put a module in the place of the router or the experts of a layer."""
    setattr(layer.block, next(name for name, child in layer.block.named_children() if child is part), module)


def is_experts(module: nn.Module, name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module is the experts of a layer: marked by transformers or by AutoEP, or by its name and weights."""
    if all(hasattr(module, mark) for mark in MARKS):
        return True
    block_name, _, child = name.rpartition(".")
    if child == "experts" and getattr(modules[block_name], "_is_autoep_layer", False):
        return True
    return type(module).__name__.endswith("Experts") and any(_ndim(each) == 3 for each in module.parameters(False))


def _find_router(name: str, modules: dict[str, nn.Module]) -> tuple[str, nn.Module | None]:
    """Find the module that holds experts and their router, also where a wrapper is around the experts (PEFT)."""
    block_name = name
    for _ in range(LEVELS):
        if not block_name:
            break
        block_name = block_name.rpartition(".")[0]
        for child in ROUTER_NAMES:
            router = getattr(modules[block_name], child, None)
            if isinstance(router, nn.Module):
                return block_name, router
    return block_name, None


def counted_in(model: nn.Module, names: list[str]) -> str:
    """Return the name of the module whose forward surrounds the MoE layers and is never recomputed.

    It is the innermost module that holds all of them, outside of every list of layers: activation checkpointing
    computes elements of such lists again. The model itself is not taken, since wrappers such as PEFT's call the
    forward of the model without its hooks.

    Args:
        model: The model.
        names: Module names of the MoE layers.
    """
    parts = [name.split(".") for name in names]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    modules = dict(model.named_modules())
    for length in range(len(common) + 1):
        if isinstance(modules[".".join(common[:length])], nn.ModuleList | nn.ModuleDict | nn.Sequential):
            return ".".join(common[: length - 1])
    return ".".join(common[:-1] if len(names) == 1 and common else common)


def _ndim(parameter: nn.Parameter) -> int:
    """Return the dimensions of a parameter, also of one that ZeRO-3 has partitioned."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers, which call it.

    Raises:
        UserError: It is divided among the devices of one process, or among those of `device_map`.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise UserError(
                "torch.nn.DataParallel runs copies of the model in threads, which cannot be counted; start one process "
                "for each device, with DistributedDataParallel"
            )
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    devices = {str(parameter.device) for parameter in model.parameters() if not parameter.is_meta}
    if len(devices) > 1:
        raise UserError(
            f"the parameters are on several devices ({listed(sorted(devices), last='and')}); load the model without "
            "device_map, and use data or expert parallelism"
        )
    return model


def text_config(model: nn.Module | None) -> Any:
    """Return the Hugging Face configuration of the text part of a model; None where it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def expert_groups(model: nn.Module) -> tuple[int, int]:
    """Return the expert groups of a Hugging Face configuration, and how many of them a token may take."""
    text = text_config(model)
    return getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1


def has_distributed_experts(model: nn.Module) -> bool:
    """Whether ranks hold different experts of this package (`dist_moe.parallelize`)."""
    meshes = (getattr(module, "mesh", None) for module in model.modules())
    return any(getattr(mesh, "expert_parallel", 1) > 1 for mesh in meshes)


def repeats_tokens(model: nn.Module) -> bool:
    """Whether this rank has the same tokens as another one that counts them: tensor parallelism.

    Args:
        model: In its wrappers.

    Raises:
        UserError: It is tensor-parallel in a way that does not say which ranks these are.
    """
    autotp_size = getattr(model, "autotp_size", None)  # of a DeepSpeed engine
    if callable(autotp_size) and autotp_size() > 1:
        raise UserError("the engine has tensor parallelism (autotp_size); give group, the ranks with different tokens")
    inner = inner_model(model)
    mesh = getattr(inner, "_device_mesh", None)  # of transformers
    if mesh is not None and (getattr(inner, "_tp_size", None) or 1) > 1:
        names = mesh.mesh_dim_names or ()
        return bool(mesh.get_local_rank("tp" if "tp" in names and mesh.ndim > 1 else None) > 0)
    for module in inner.modules():  # of AutoEP, which may share the ranks of tensor parallelism
        handles = getattr(module, "folding_group_handles", None)
        if handles is not None and handles.spec.tp_size > 1:
            return dist.get_rank(vars(module)["tp_group"]) > 0
    for parameter in inner.parameters():
        if isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ()):
            return parameter.device_mesh.get_local_rank("tp") > 0
    return False
