"""The tensors of a converted model by their names in folders: each expert's by itself, and those of a family.

A rank names the tensors that it holds.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dist_moe.checkpoint.format.family_names import NO_NAMES, FamilyNames, Shapes, Stack, find_names
from dist_moe.comm.mesh import Mesh
from dist_moe.engine.optimizer_shards import ParameterSlice
from dist_moe.families.composite import find_composite, is_composite
from dist_moe.families.model_class import find_model_class
from dist_moe.families.registry import family_of
from dist_moe.model.build import empty_model, family_rule
from dist_moe.model.convert import MoeLayer, find_layers
from dist_moe.model.family.router import ORIGINAL
from dist_moe.model.head import HEAD_KEYS, has_head

EXPERTS_STATE = re.compile(r"\.experts\.(local\.|held$)")
"""In names of the state of a rank's experts, each of which has names of its own in a folder."""
SINGLE_RANK = Mesh(world_size=1, rank=0, expert_parallel=1)


def stored_name(name: str) -> str:
    """Return the name in the folder of a parameter or buffer that is no expert's and no selection bias."""
    return name.replace(f".{ORIGINAL}.", ".")


def stored_biases(model: PreTrainedModel, own_type: bool) -> dict[str, tuple[str, torch.Size]]:
    """Return the name and the shape of each selection bias in the files, by its name in the model; only those stored.

    Args:
        model: The converted model.
        own_type: Whether the folder has a model_type of its own, which has a place for every bias.
    """
    names = {id(module): name for name, module in model.named_modules()}
    family = family_of(model.config.model_type)
    below_router = None if family.is_probed else family.bias_name
    found = {}
    for layer in find_layers(model):
        router = names[id(layer.router)]
        shape, own = layer.router.selection_bias.shape, layer.router.family_bias
        if own is not None:
            place, shape = f"{stored_name(names[id(own.owner)] + '.')}{own.name}", getattr(own.owner, own.name).shape
        elif own_type or below_router is not None:
            place = f"{router}.{below_router or 'selection_bias'}"
        else:
            continue
        found[f"{router}.selection_bias"] = (place, shape)
    return found


def local_experts(layer: MoeLayer, mesh: Mesh) -> Iterator[tuple[int, str]]:
    """Yield (index in the stacked parameters, prefix of the names on disk) of every expert of this rank."""
    for index, expert in enumerate(mesh.local_experts(layer.experts.num_experts)):
        yield index, f"{layer.name}.experts.{expert}"


def expert_tensors(layers: list[MoeLayer], mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, view into the parameter) of every expert of this rank."""
    for layer in layers:
        for index, prefix in local_experts(layer, mesh):
            for name, part in layer.experts.local.parts.items():
                yield f"{prefix}.{name}", part.view(index)


def dense_tensors(model: PreTrainedModel, layers: list[MoeLayer], own_type: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of everything that is not a routed expert; tied weights once."""
    biases = stored_biases(model, own_type)
    routers = tuple(f"{layer.name}." for layer in layers)
    tied = "lm_head.weight" if getattr(model.config, "tie_word_embeddings", False) else None
    for name, tensor in model.state_dict().items():
        if name == tied or (name.startswith(routers) and EXPERTS_STATE.search(name)):
            continue
        if name.endswith(".selection_bias"):
            if name in biases:
                place, shape = biases[name]
                yield place, tensor.view(shape)
            continue
        yield stored_name(name), tensor


def parameter_slices(model: PreTrainedModel, mesh: Mesh) -> list[ParameterSlice]:
    """Every tensor of the folder that is a parameter, or a part of one, on this rank."""
    slices = [
        ParameterSlice(stored_name(name), parameter, 0, parameter.numel())
        for name, parameter in model.named_parameters()
        if ".experts.local." not in name
    ]
    for layer in find_layers(model):
        for index, prefix in local_experts(layer, mesh):
            for name, part in layer.experts.local.parts.items():
                size = part.view(index).numel()
                slices.append(ParameterSlice(f"{prefix}.{name}", part.stacked, part.start(index), size))
    return slices


def in_memory_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[MoeLayer]]:
    """Return the tensors of a model by their names in memory in transformers.

    Args:
        model: Converted, with all experts.

    Returns:
        The tensors, and the MoE layers whose selection bias the family has no place for.
    """
    layers = find_layers(model)
    tensors = dict(dense_tensors(model, layers, own_type=False))
    for layer in layers:
        for name, stacked in layer.experts.local.named_parameters():
            tensors[f"{layer.name}.experts.{name}"] = stacked.detach()
    with_place = stored_biases(model, own_type=False)
    names = {id(module): name for name, module in model.named_modules()}
    return tensors, [layer for layer in layers if f"{names[id(layer.router)]}.selection_bias" not in with_place]


class FamilyLayout(NamedTuple):
    """What the files of a family hold.

    Attributes:
        names: Of the tensors.
        has_biases: Whether every layer has a place for a selection bias.
    """

    names: FamilyNames
    has_biases: bool


def family_layout(config: PretrainedConfig) -> FamilyLayout | None:
    """Return what the files of a family hold; None where the names are those of this package."""
    if not family_of(config.model_type).is_probed or has_head(config):
        return None
    return _family_layout(config.model_type, _settings_json(config))


def family_names(config: PretrainedConfig, raw: Mapping[str, Any] = MappingProxyType({})) -> FamilyNames | None:
    """Return the names of tensors in the files of a folder; None where they are those of this package.

    Args:
        config: Of the language model.
        raw: The content of the folder's config.json, which may be that of a multimodal model; {}: it is not.
    """
    if is_composite(raw):
        return _composite_names(config.model_type, _settings_json(config), json.dumps(raw, sort_keys=True))
    if not family_of(config.model_type).is_probed:
        return None
    return _family_layout(config.model_type, _settings_json(config)).names


def _settings_json(config: PretrainedConfig) -> str:
    """Return the settings of the language model, also of a config that gives it another head."""
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in ("model_type", *HEAD_KEYS)}
    return json.dumps(settings, sort_keys=True, default=str)


@functools.lru_cache(maxsize=8)
def _family_layout(architecture: str, settings_json: str) -> FamilyLayout:
    config = AutoConfig.for_model(architecture, **json.loads(settings_json))
    model, shapes, stacks = _described(config)
    has_biases = len(stored_biases(model, own_type=False)) == len(find_layers(model))
    kind = find_model_class(config, family_of(architecture).encoder)
    if kind is None:  # no folder of transformers has this model alone
        return FamilyLayout(NO_NAMES, has_biases)
    with torch.device("meta"):
        theirs: PreTrainedModel = kind._from_config(config)
    return FamilyLayout(find_names(theirs, shapes, stacks), has_biases)


@functools.lru_cache(maxsize=2)
def _composite_names(architecture: str, settings_json: str, raw_json: str) -> FamilyNames:
    config = AutoConfig.for_model(architecture, **json.loads(settings_json))
    composite = find_composite(json.loads(raw_json))
    _, shapes, stacks = _described(config)
    return find_names(composite.model, shapes, stacks, composite.name_of)


def _described(config: PretrainedConfig) -> tuple[PreTrainedModel, Shapes, dict[str, Stack]]:
    """Return the converted model on the meta device, the shapes of its tensors in a folder, and its stacks."""
    model = empty_model(config, family_rule(config, family_of(config.model_type).score), SINGLE_RANK)
    layers = find_layers(model)
    tensors = {**dict(expert_tensors(layers, SINGLE_RANK)), **dict(dense_tensors(model, layers, own_type=False))}
    stacks = {}
    for layer in layers:
        local, prefix = layer.experts.local, f"{layer.name}.experts"
        for name, parameter in local.named_parameters():
            parts = ((part, each.rows) for part, each in local.parts.items() if each.stacked is parameter)
            stacks[f"{prefix}.{name}"] = Stack(tuple(parts), prefix)
    return model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, stacks
