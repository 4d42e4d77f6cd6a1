"""Saves a model whose routers or experts are of this package, as one folder of Hugging Face."""

import functools
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dist_moe.checkpoint.format.hf_weights import own_type_of_model, save_weights
from dist_moe.checkpoint.format.plain_folder import write_plain
from dist_moe.comm.mesh import Mesh
from dist_moe.errors import UserError
from dist_moe.families.registry import ARCHITECTURES
from dist_moe.model.build import family_rule
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.probe.layers import find_layers, inner_model
from dist_moe.replace.experts import HELD, placed_layers

LARGEST_FILE = "50GB"
PARTIAL = ".partial"
logger = logging.getLogger("dist_moe")


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a folder of Hugging Face with the experts of all ranks, whatever the layout. Collective.

    transformers opens it, unless the routing is one that the family cannot express (as after `route`): the folder then
    has a `model_type` of its own, which `dist_moe.from_pretrained` and `dist-moe` open, and a warning says so.

    Args:
        model: After `parallelize`, `route` or `from_pretrained`; also in a wrapper.
        folder: Created if needed.

    Raises:
        UserError: The model has no experts of this package, or its family is not known with this routing.
    """
    inner: Any = inner_model(model)
    layers = placed_layers(inner)
    if not layers:
        raise UserError("the model has no experts of this package; save it by its own save_pretrained")
    mesh, path = next(iter(layers.values())).mesh, Path(folder)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    # Where every rank has the whole model, one writes it.
    if mesh.world_size == ranks or dist.get_rank() == 0:
        _write(inner, mesh, path)
    if ranks > 1:
        dist.barrier()


def save_by_this_package(model: nn.Module) -> None:
    """Make the method `save_pretrained` of a model write what `dist_moe.save_pretrained` does.

    transformers' own would store names that its class does not read, and the experts of one rank.
    """
    if isinstance(model, PreTrainedModel):
        vars(model)["save_pretrained"] = functools.partial(_save_one, model)


def _save_one(model: nn.Module, folder: str | Path, *_: Any, **__: Any) -> None:
    """Be the model's own `save_pretrained`, which frameworks call on one rank."""
    mesh = next(iter(placed_layers(model).values())).mesh
    if mesh.expert_parallel > 1:
        raise UserError(
            "the experts are distributed over ranks, and this call is of one; call dist_moe.save_pretrained(model, "
            "folder) on all ranks (in a Trainer, set save_strategy='no')"
        )
    _write(cast(PreTrainedModel, model), Mesh(1, 0, 1), Path(folder))


def _write(model: PreTrainedModel, mesh: Mesh, folder: Path) -> None:
    """Write the folder. Collective of the ranks of the mesh."""
    if not isinstance(find_layers(model)[0].router, Router):
        _write_whole(model, mesh, folder)
        return
    architecture = model.config.model_type
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"a {architecture} cannot be saved with this routing, since dist-moe train does not train it "
            "(docs/families.md); save model.state_dict()"
        )
    if own_type := own_type_of_model(model, balanced=False):
        if _is_plain(model):
            _write_plain(model, mesh, folder)
            return
        logger.warning("%s", own_type)
    save_weights(model, mesh, folder, balanced=False)


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether the family computes the same routing, although its files stack the experts of a layer."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    own = family_rule(model.config, ARCHITECTURES[model.config.model_type].score)
    same = all(router.rule == own for router in routers)
    return same and not any(router.family_bias is None and bool(router.selection_bias.any()) for router in routers)


def _write_plain(model: PreTrainedModel, mesh: Mesh, folder: Path) -> None:
    """Write the files of a family that stacks its experts: by way of a folder of this package. Collective."""
    partial = folder.with_name(folder.name + PARTIAL)
    save_weights(model, mesh, partial, balanced=False)
    if mesh.rank == 0:
        write_plain(partial, folder, "keep", None)
        shutil.rmtree(partial)


@torch.no_grad()
def _write_whole(model: PreTrainedModel, mesh: Mesh, folder: Path) -> None:
    """Write the folder by transformers, with the experts of the row of rank 0. Collective."""
    layers = placed_layers(model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = next((layer for place, layer in layers.items() if name.startswith(f"{place}.")), None)
        if layer is not None and name.endswith(f".{HELD}"):
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole = whole if layer is None else _gather(whole, layer)
        if mesh.rank == 0:
            state[name if layer is None else name.replace(".local.", ".")] = whole.detach().cpu()
    if mesh.rank != 0:
        return
    kind: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    with torch.device("meta"):
        plain = kind._from_config(model.config)
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    if missing := [name for name, tensor in plain.state_dict().items() if tensor.is_meta]:
        raise UserError(f"the model has no value for {missing[0]}, which {kind.__name__} stores")
    plain.config.dtype = model.dtype
    plain.generation_config = getattr(model, "generation_config", None)
    plain.save_pretrained(folder, max_shard_size=LARGEST_FILE)


def _gather(local: Tensor, layer: ExpertParallelLayer) -> Tensor:
    """Return the stacked weights of all experts. Collective of the row."""
    if layer.mesh.expert_parallel == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(layer.mesh.expert_parallel)]
    dist.all_gather(parts, local.contiguous(), group=layer.mesh.ep_group)
    return torch.cat(parts)
