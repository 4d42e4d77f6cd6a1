"""Expert parallelism for a model of transformers in a training loop of PyTorch, DDP, FSDP2 or accelerate."""

import logging
import math
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from dist_moe.checkpoint.format.model_tensors import SINGLE_RANK
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.errors import UserError
from dist_moe.probe.layers import inner_model
from dist_moe.replace.experts import HELD, local_parameters, mark_held, placed_layers, read_layers
from dist_moe.replace.folder_names import read_folder_names
from dist_moe.replace.guard import Guard
from dist_moe.replace.saving import save_by_this_package
from dist_moe.text import listed

Model = TypeVar("Model", bound=nn.Module)
Degree = int | Literal["auto"]
GROUP_NAME = "dist_moe.parallelize"
logger = logging.getLogger("dist_moe")


def parallelize(model: Model, expert_parallel: Degree = "auto") -> Model:
    """Distribute the experts of a Hugging Face MoE model over the ranks, in place. Collective.

    Each rank keeps its experts, and tokens are exchanged by all-to-all collectives; the routers and everything else
    stay as they are, on every rank. Call it before the optimizer and wrappers such as DDP are made. The gradients of
    experts are averaged by hooks over all ranks, as DDP averages the others; DDP leaves the experts alone, and FSDP2
    needs `ignored_params=set(dist_moe.expert_parameters(model))`. Clip with `dist_moe.clip_grad_norm_`: a norm of one
    rank's experts differs from that of another rank.

    Args:
        model: The model with its weights, equal on all ranks, not in a wrapper.
        expert_parallel: The ranks that hold different experts, a divisor of the number of ranks and of the experts;
            `auto` is the largest one.

    Returns:
        `model`.

    Raises:
        UserError: The experts compute something that is not known, are distributed already, or cannot be divided.
    """
    if placed_layers(model):
        raise UserError("the experts of the model are of this package already; distribute the experts before `route`")
    layers = read_layers(model)
    mesh = mesh_of([layer.probed.num_experts for layer in layers], expert_parallel)
    for layer in layers:
        layer.place_experts(mesh)
    prepare(model, mesh)
    return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of this rank's experts; none where every rank has all experts, as copies."""
    return [parameter for _, parameter in _distributed_parameters(inner_model(model))]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients of a model with distributed experts by their norm over all ranks. Collective.

    Args:
        model: Also in a wrapper. Its gradients are averaged over the ranks.
        max_norm: The largest norm.

    Returns:
        The norm before, equal on all ranks.
    """
    inner = inner_model(model)
    layers = placed_layers(inner)
    if not layers:
        raise UserError("the model has no experts of this package; use torch.nn.utils.clip_grad_norm_")
    mesh, device = next(iter(layers.values())).mesh, next(inner.parameters()).device
    ours = {id(parameter) for parameter in expert_parameters(inner)}
    gradients = [(id(p) in ours, p.grad) for p in inner.parameters() if p.grad is not None]
    dense = [gradient for is_expert, gradient in gradients if not is_expert]
    experts = [gradient for is_expert, gradient in gradients if is_expert]
    squared = get_total_norm(experts).to(device, torch.float32).square()
    if mesh.ep_group is not None:
        dist.all_reduce(squared, group=mesh.ep_group)
    dense_norm = get_total_norm(dense)
    if isinstance(dense_norm, DTensor):
        dense_norm = dense_norm.full_tensor()
    total = (squared + dense_norm.to(device, torch.float32).square()).sqrt()
    factor = float(max_norm / (total + 1e-6))
    if not math.isfinite(factor) or factor < 1:
        for _, gradient in gradients:
            gradient.mul_(factor)
    return total


def mesh_of(experts: list[int], expert_parallel: Degree) -> Mesh:
    """Make the mesh of the ranks. Collective.

    Args:
        experts: Of each layer.
        expert_parallel: As of `parallelize`.

    Raises:
        UserError: It does not divide the ranks and the experts.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    possible = [size for size in range(1, ranks + 1) if math.gcd(ranks, *experts) % size == 0]
    degree = possible[-1] if expert_parallel == "auto" else expert_parallel
    if expert_parallel == "auto" and degree == 1 < ranks:
        logger.warning("every rank has all experts: %d ranks and %s have no common divisor", ranks, experts)
    if degree not in possible:
        raise UserError(
            f"expert_parallel={degree} does not divide the ranks ({ranks}) and the experts "
            f"({listed(sorted(set(experts)), last='and')}); use {listed(possible)}"
        )
    return make_mesh(degree) if dist.is_initialized() else SINGLE_RANK


def prepare(model: nn.Module, mesh: Mesh) -> None:
    """Make the gradients of distributed experts those of the mean loss, and keep other code from changing them."""
    save_by_this_package(model)
    read_folder_names(model)
    if mesh.expert_parallel == 1:
        return  # every rank has every expert, so that DDP and FSDP2 do all of it
    column = _column_group(mesh)

    def average(gradient: Tensor) -> Tensor:
        # Each rank's loss is a mean over its tokens, and this gradient has those of all ranks in the row.
        averaged = gradient / mesh.world_size
        if column is not None:
            dist.all_reduce(averaged, group=column)
        return averaged

    names = []
    for name, layer in placed_layers(model).items():
        mark_held(name, layer)
        names.append(f"{name}.{HELD}")
    for name, parameter in _distributed_parameters(model):
        names.append(name)
        is_trained = parameter.requires_grad
        parameter.requires_grad_(True).register_hook(average)  # also of a parameter that is trained later
        parameter.requires_grad_(is_trained)
        marked: Any = parameter
        # As DeepSpeed marks experts. It has no group of this name, and so refuses a model whose experts it would mix.
        marked.allreduce, marked.group_name = False, GROUP_NAME
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    model.register_forward_pre_hook(Guard(model, mesh))


def _distributed_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if any(layer.mesh.expert_parallel > 1 for layer in placed_layers(model).values()):
        yield from local_parameters(model)


def _column_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """Return the group of the ranks with the same experts; None for one rank. Collective."""
    size = mesh.expert_parallel
    if mesh.world_size == size:
        return None
    groups = [dist.new_group(list(range(first, mesh.world_size, size))) for first in range(size)]
    return groups[mesh.ep_rank]
