"""Weights as a Hugging Face folder: what `save_pretrained` of the class would write, sharded by who holds what.

Names on disk follow Hugging Face: one expert's weights are three tensors (gate, up, down), with the global id of the
expert in the name. Where the architecture cannot express the routing (a selection bias, another gate function, a
scaling on a family without one), the folder carries a `model_type` of its own, so that plain `transformers` refuses
it rather than compute another function, and config.json says in its section `dist_moe` what the family's own fields
do not say.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.hf_folder import (
    FUSED,
    INDEX,
    Source,
    find_sources,
    raw_config,
    read_sources,
    tensor_files,
)
from dist_moe.checkpoint.format.shard_reader import ShardReader, write_tensors
from dist_moe.comm.mesh import Mesh
from dist_moe.config.family import family_of
from dist_moe.config.pretrained import OWN_PREFIX
from dist_moe.engine.optimizer_shards import MASTER, ParameterSlice
from dist_moe.model.build import empty_model, family_rule, materialise
from dist_moe.model.convert import MoeLayer, find_layers
from dist_moe.model.families import Adapter, adapter_of
from dist_moe.moe.select import RandomRouting, Rule, ThresholdRouting, TopK

# What config.json calls the kinds of rules.
RULES: dict[str, type[Rule]] = {"top_k": TopK, "threshold": ThresholdRouting, "forced": RandomRouting}


def save_weights(model: PreTrainedModel, mesh: Mesh, folder: Path, balanced: bool) -> None:
    """Write `folder`; every rank calls it, and each expert is written by one of the ranks that hold it.

    balanced: whether a policy moves the selection bias. No rank gathers another's experts. The folder is complete
    when the call returns on any rank. The tensors keep their dtype, which config.json names.
    """
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.safetensors"), folder / INDEX):  # of an earlier save, perhaps on more ranks
            old.unlink(missing_ok=True)
    _barrier()
    for name, tensors in shard_tensors(model, mesh, balanced).items():
        write_tensors(folder / name, tensors)
    _barrier()
    if mesh.rank == 0:
        for name, text in config_files(model, balanced).items():
            (folder / name).write_text(text, encoding="utf-8")
        write_index(folder)
    _barrier()


def shard_tensors(model: PreTrainedModel, mesh: Mesh, balanced: bool) -> dict[str, dict[str, Tensor]]:
    """This rank's part of the folder: tensors by name, by file; views of the parameters. Empty where another has it."""
    if mesh.edp_rank != 0:
        return {}
    layers = find_layers(model)
    tensors = dict(_expert_tensors(layers, mesh))
    if mesh.ep_rank == 0:
        bias = _bias_name(adapter_of(model.config.model_type), _own_type(model, layers, balanced))
        tensors |= dict(_dense_tensors(model, layers, bias))
    return {f"model-{mesh.ep_rank + 1:05d}-of-{mesh.expert_parallel:05d}.safetensors": tensors}


def config_files(model: PreTrainedModel, balanced: bool) -> dict[str, str]:
    """config.json and generation_config.json of the folder: their texts, by name."""
    layers = find_layers(model)
    rule = layers[0].router.rule
    raw = model.config.to_diff_dict()
    raw["architectures"] = [type(model).__name__]
    raw["dtype"] = str(model.dtype).removeprefix("torch.")
    if _own_type(model, layers, balanced):
        raw["model_type"] = OWN_PREFIX + model.config.model_type
        raw["dist_moe"] = _beyond(model.config, rule)
    generation = GenerationConfig.from_model_config(model.config)
    return {
        "config.json": json.dumps(raw, indent=2, sort_keys=True) + "\n",
        "generation_config.json": generation.to_json_string(),
    }


def _own_type(model: PreTrainedModel, layers: list[MoeLayer], balanced: bool) -> bool:
    """Whether the family's own `model_type` would let plain `transformers` compute another function."""
    biased = balanced or any(bool(layer.router.selection_bias.any()) for layer in layers)
    return not expressible(model.config, layers[0].router.rule, biased)


def load_weights(folder: Path, mesh: Mesh) -> PreTrainedModel:
    """Open a folder written by `save_weights`, or by `save_pretrained` of a known family -> a model on the CPU in fp32.

    Only this rank's experts are read. Errors: WeightsError with all missing and unexpected tensors, or for a folder
    that is none; memory is taken only when the files are seen to hold what config.json says.
    """
    config, rule = read_config(folder)
    model = shaped_model(config, rule, mesh, folder)
    find_weights(model, mesh, folder)
    materialise(model)
    for layer in find_layers(model):
        layer.router.reset_state()
    fill_weights(model, mesh, folder)
    return model


def fill_weights(model: PreTrainedModel, mesh: Mesh, folder: Path, masters: ShardReader | None = None) -> None:
    """Copy the tensors of `folder` into `model`, the experts of this rank alone; WeightsError as `load_weights`.

    masters: where fp32 weights are found, which are taken before those of the folder.
    """
    wanted = _wanted(model, mesh, folder)
    for name, stored in read_sources(find_weights(model, mesh, folder)):
        wanted[name].copy_(stored)
    for name, tensor in wanted.items():
        if masters is not None and masters.holds(MASTER, name):
            tensor.copy_(masters.read(MASTER, name, 0, tensor.numel()).view_as(tensor))


def find_weights(model: PreTrainedModel, mesh: Mesh, folder: Path) -> dict[str, Source]:
    """Where the folder holds each tensor of this rank; WeightsError with everything that does not fit."""
    experts = {layer.name: layer.experts.experts for layer in find_layers(model)}
    # What the class passes over, such as DeepSeek-V3's layer that predicts further tokens.
    further = model._keys_to_ignore_on_load_unexpected or ()
    return find_sources(folder, _wanted(model, mesh, folder), experts, further)


def _wanted(model: PreTrainedModel, mesh: Mesh, folder: Path) -> dict[str, Tensor]:
    """The tensors of this rank by their names in the folder."""
    adapter, layers = adapter_of(model.config.model_type), find_layers(model)
    stored_bias = _bias_name(adapter, own_type=raw_config(folder)["model_type"].startswith(OWN_PREFIX))
    return dict(_expert_tensors(layers, mesh)) | dict(_dense_tensors(model, layers, stored_bias))


def shaped_model(config: PretrainedConfig, rule: Rule, mesh: Mesh, folder: Path) -> PreTrainedModel:
    """The empty model of the folder's config; WeightsError where it can be none, or has more parts than the files."""
    stored, experts = tensor_files(folder).values(), family_of(config.model_type).experts
    most = len(stored) + max((tensor.shape[0] for tensor in stored if FUSED.fullmatch(tensor.name)), default=0)
    try:
        for name in ("num_hidden_layers", experts):
            if getattr(config, name) > most:
                raise ValueError(f"{name}={getattr(config, name)}, with {len(stored)} tensors in the files")
        return empty_model(config, rule, mesh)
    except Exception as error:  # whatever the class of another library raises for values of any kind
        raise WeightsError(f"{folder / 'config.json'} is of no model ({error}); use another checkpoint") from None


def named_parameters(model: PreTrainedModel, mesh: Mesh) -> list[ParameterSlice]:
    """Every tensor of the folder that is a parameter or a part of one on this rank, and where it lies there."""
    named = [
        ParameterSlice(name, parameter, 0, parameter.numel())
        for name, parameter in model.named_parameters()
        if ".experts.local." not in name
    ]
    for layer in find_layers(model):
        up, down = layer.experts.local.gate_up_proj, layer.experts.local.down_proj
        size = down[0].numel()
        for place, prefix in _local_experts(layer, mesh):
            named.append(ParameterSlice(f"{prefix}.gate_proj.weight", up, 2 * place * size, size))
            named.append(ParameterSlice(f"{prefix}.up_proj.weight", up, (2 * place + 1) * size, size))
            named.append(ParameterSlice(f"{prefix}.down_proj.weight", down, place * size, size))
    return named


def expressible(config: PretrainedConfig, rule: Rule, biased: bool) -> bool:
    """Whether plain `transformers` computes the same routing from the family's own config and weights."""
    bias_has_a_place = adapter_of(config.model_type).bias is not None
    return not _beyond(config, rule) and (bias_has_a_place or not biased)


def read_config(folder: Path) -> tuple[PretrainedConfig, Rule]:
    """The Hugging Face config of a weights folder, ours or theirs, and its rule of routing."""
    raw = raw_config(folder)
    ours = raw.pop("dist_moe", {})
    model_type = raw.pop("model_type").removeprefix(OWN_PREFIX)
    try:
        adapter = adapter_of(model_type)
        config = AutoConfig.for_model(model_type, **raw)
        kind = RULES[ours.pop("selection", "top_k")]
        if kind is not TopK:
            return config, kind(**ours)
        return config, replace(family_rule(config, adapter.score), **ours)
    except Exception as error:  # whatever the class of another library raises for values of any kind
        reason = " ".join(str(error.__cause__ or error).split())
        raise WeightsError(f"{folder / 'config.json'} cannot be used ({reason}); use another checkpoint") from None


def _beyond(config: PretrainedConfig, rule: Rule) -> dict[str, Any]:
    """What config.json has to say of `rule`, because the family computes something else from its own fields."""
    if not isinstance(rule, TopK):
        kind = next(name for name, known in RULES.items() if isinstance(rule, known))
        return {"selection": kind, **asdict(rule)}
    stated = asdict(family_rule(config, adapter_of(config.model_type).score))
    return {name: value for name, value in asdict(rule).items() if value != stated[name]}


def _bias_name(adapter: Adapter, own_type: bool) -> str | None:
    """Under which name the selection bias stands in the files; None where they have none."""
    return adapter.bias or ("selection_bias" if own_type else None)


def bias_in_files(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Name of each MoE layer -> that of its selection bias in the folder, where it has any."""
    adapter = adapter_of(model.config.model_type)
    bias = _bias_name(adapter, own_type=raw_config(folder)["model_type"].startswith(OWN_PREFIX))
    return {} if bias is None else {layer.name: f"{layer.name}.{adapter.router}.{bias}" for layer in find_layers(model)}


def _local_experts(layer: MoeLayer, mesh: Mesh) -> Iterator[tuple[int, str]]:
    """(place in the stacked parameters, prefix of the names on disk) of every expert that this rank holds."""
    for place, expert in enumerate(mesh.local_experts(layer.experts.experts)):
        yield place, f"{layer.name}.experts.{expert}"


def _expert_tensors(layers: list[MoeLayer], mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, view into the parameter) of every expert that this rank holds."""
    for layer in layers:
        local = layer.experts.local
        half = local.gate_up_proj.shape[1] // 2
        for place, prefix in _local_experts(layer, mesh):
            gate_up = local.gate_up_proj.detach()[place]
            yield f"{prefix}.gate_proj.weight", gate_up[:half]
            yield f"{prefix}.up_proj.weight", gate_up[half:]
            yield f"{prefix}.down_proj.weight", local.down_proj.detach()[place]


def _dense_tensors(model: PreTrainedModel, layers: list[MoeLayer], bias: str | None) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) of everything that is not a routed expert; tied weights once."""
    routers = tuple(f"{layer.name}." for layer in layers)
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    for name, tensor in model.state_dict().items():
        if name == tied or (name.startswith(routers) and ".experts.local." in name):
            continue
        if name.endswith(".selection_bias"):
            if bias is not None:
                yield name.removesuffix("selection_bias") + bias, tensor
            continue
        yield name, tensor


def write_index(folder: Path) -> Path:
    """Write which tensor lies in which of the folder's files, and the bytes of all -> the index."""
    files = tensor_files(folder)
    total = sum(stored.bytes for stored in files.values())
    weight_map = {name: stored.file.name for name, stored in sorted(files.items())}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder / INDEX


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1)) if dist.get_backend() == "gloo" else dist.barrier()
