"""Saves a model whose routers or experts are of this package, as one folder of Hugging Face."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.format.hf_folder import read_raw_config
from dist_moe.checkpoint.format.hf_weights import own_type_of_model, save_weights
from dist_moe.checkpoint.format.model_tensors import SINGLE_RANK
from dist_moe.checkpoint.format.plain_folder import write_by_class, write_plain
from dist_moe.comm.mesh import Mesh
from dist_moe.config.pretrained import OWN_PREFIX
from dist_moe.errors import UserError
from dist_moe.families.model_class import model_class
from dist_moe.families.registry import ARCHITECTURES
from dist_moe.files import write_atomically
from dist_moe.model.build import family_rule
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.probe.layers import inner_model
from dist_moe.replace.experts import HELD, placed_layers

PARTIAL = ".partial"
logger = logging.getLogger("dist_moe")


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a folder of Hugging Face with the experts of all ranks, in any layout. Collective.

    transformers opens it, unless the routing is one that the family cannot express (as after `route`): the folder then
    has a `model_type` of its own, which `dist_moe.from_pretrained` and `dist-moe` open, and a warning says so.

    Args:
        model: After `parallelize`, `route` or `from_pretrained`; also in a wrapper.
        folder: Created if needed. Weights that it has are replaced.

    Raises:
        UserError: The model has no experts of this package, or its family is not known with this routing, or it is
            sharded by FSDP2 with routers of this package, or it has adapters.
        JobCheckpointError: On every rank, if one cannot write.
    """
    inner: Any = inner_model(model)
    layers = placed_layers(inner)
    if not layers:
        raise UserError("the model has no experts of this package; save it by its own save_pretrained")
    mesh, path = next(iter(layers.values())).mesh, Path(folder).resolve()
    _check_savable(inner)
    if not is_routed(inner):
        state = _whole_state(inner)
        _on_first_rank(path, partial(_write_by_transformers, inner, state, path))
    elif mesh.expert_parallel == 1:  # every rank has the whole model
        _on_first_rank(path, partial(_write, inner, SINGLE_RANK, path))
    else:
        _write(inner, mesh, path)


def save_by_this_package(model: nn.Module) -> None:
    """Make the method `save_pretrained` of a model write what `dist_moe.save_pretrained` does.

    transformers' own would store names that its class does not read, and the experts of one rank.
    """
    if isinstance(model, PreTrainedModel):
        vars(model)["save_pretrained"] = partial(_save_one, model)


def has_known_family(model: nn.Module) -> bool:
    """Whether `dist-moe train` trains models of this class: of an encoder, those without a head of transformers."""
    config: Any = getattr(model, "config", None)
    family = ARCHITECTURES.get(getattr(config, "model_type", ""))
    return family is not None and (not family.encoder or isinstance(model, model_class(config, is_encoder=True)))


def is_routed(model: nn.Module) -> bool:
    """Whether the routers are of this package."""
    return any(isinstance(module, Router) for module in model.modules())


def _save_one(model: Any, folder: str | Path, is_main_process: bool = True, *_: Any, **__: Any) -> None:
    """Be the model's own `save_pretrained`, which frameworks call on one rank, or on all with `is_main_process`."""
    if next(iter(placed_layers(model).values())).mesh.expert_parallel > 1:
        raise UserError(
            "the experts are distributed over ranks, and this call is of one; call dist_moe.save_pretrained(model, "
            "folder) on all ranks (in a Trainer, set save_strategy='no')"
        )
    _check_savable(model)
    if not is_main_process:
        return
    path = Path(folder).resolve()
    if is_routed(model):
        _write(model, SINGLE_RANK, path)
    else:
        _write_by_transformers(model, _whole_state(model), path)


def _check_savable(model: PreTrainedModel) -> None:
    """Refuse, on all ranks, what cannot be saved.

    Raises:
        UserError: As `save_pretrained`.
    """
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise UserError("the model has adapters (PEFT); call merge_and_unload() first, or save the adapters alone")
    if not is_routed(model):
        return
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UserError(
            "FSDP2 has sharded a model with routers of this package, which is not gathered here; save its state by "
            "torch.distributed.checkpoint, load that into a model that is not sharded, and save it"
        )
    if not has_known_family(model):
        raise UserError(
            f"the {model.config.model_type} cannot be saved with this routing, since dist-moe train does not train its "
            f"class {type(model).__name__} (docs/families.md: encoders are trained as base models, others as language "
            "models); route that class, or save model.state_dict()"
        )


def _on_first_rank(folder: Path, work: Callable[[], None]) -> None:
    """Do some work on rank 0, and raise on all ranks if it fails. Collective."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    everyone = Mesh(ranks, rank, 1)
    run_on_all_ranks(everyone, f"{folder} could not be saved", work if rank == 0 else lambda: None)


def _write(model: PreTrainedModel, mesh: Mesh, folder: Path) -> None:
    """Write a routed model. Collective of the mesh."""
    # The files of a family that stacks its experts are made from a folder of this package.
    first = folder.with_name(folder.name + PARTIAL) if _is_plain(model) else folder
    save_weights(model, mesh, first, balanced=False)
    finish = partial(_finish, model, first, folder)
    if mesh.world_size > 1:
        _on_first_rank(folder, finish)
    else:
        finish()


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether the family computes the same routing, although its files stack the experts of a layer."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    own = family_rule(model.config, ARCHITECTURES[model.config.model_type].score)
    same = all(router.rule == own for router in routers)
    without_bias = not any(each.family_bias is None and bool(each.selection_bias.any()) for each in routers)
    return bool(own_type_of_model(model, balanced=False)) and same and without_bias


def _finish(model: PreTrainedModel, first: Path, folder: Path) -> None:
    """Make the family's files of what was written first, write the settings of generation, and say what opens them."""
    if first != folder:
        write_plain(first, folder, "keep", None)
        shutil.rmtree(first)
    settings: Any = getattr(model, "generation_config", None)
    if settings is not None:
        write_atomically(folder / "generation_config.json", settings.to_json_string())
    if read_raw_config(folder)["model_type"].startswith(OWN_PREFIX):
        logger.warning("%s", own_type_of_model(model, balanced=False))


@torch.no_grad()
def _whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state of a model with the routers of its family, by its names in transformers. Collective.

    Returns:
        On rank 0; empty on the others.
    """
    layers = placed_layers(model)
    first = not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = next((layer for place, layer in layers.items() if name.startswith(f"{place}.")), None)
        if layer is not None and name.endswith(f".{HELD}"):
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole = whole if layer is None else _gather(whole, layer)
        if first:
            state[name if layer is None else name.replace(".local.", ".")] = whole.detach().cpu()
    return state


def _write_by_transformers(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    kind: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    write_by_class(kind, model.config, state, model.dtype, getattr(model, "generation_config", None), folder)


def _gather(local: Tensor, layer: ExpertParallelLayer) -> Tensor:
    """Return the stacked weights of all experts. Collective of the row."""
    if layer.mesh.expert_parallel == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(layer.mesh.expert_parallel)]
    dist.all_gather(parts, local.contiguous(), group=layer.mesh.ep_group)
    return torch.cat(parts)
