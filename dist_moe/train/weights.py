"""Weights as a Hugging Face folder: what `save_pretrained` of the class would write, sharded by who holds what.

Names on disk follow Hugging Face: one expert's weights are three tensors (gate, up, down), with the global id of the
expert in the name. Where the architecture cannot express the routing (a selection bias, another gate function, a
scaling on a family without one), the folder carries a `model_type` of its own, so that plain `transformers` refuses
it rather than compute another function, and config.json says in its section `dist_moe` what the family's own fields
do not say.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from dist_moe.comm.mesh import Mesh
from dist_moe.config.errors import UserError
from dist_moe.model.build import empty_model, family_rule, materialise
from dist_moe.model.convert import MoeLayer, find_layers
from dist_moe.model.families import Adapter, adapter_of
from dist_moe.moe.select import Forced, Rule, Threshold, TopK
from dist_moe.train.elements import ElementReader, write_tensors
from dist_moe.train.holding import MASTER, Named

OWN_PREFIX = "dist_moe_"
# What config.json calls the kinds of rules.
RULES: dict[str, type[Rule]] = {"top_k": TopK, "threshold": Threshold, "forced": Forced}
INDEX = "model.safetensors.index.json"


class WeightsError(UserError, ValueError):
    """A weights folder that does not fit; the message lists every tensor that is missing or unexpected."""


def save_weights(model: PreTrainedModel, mesh: Mesh, folder: Path, balanced: bool) -> None:
    """Write `folder`; every rank calls it, and each expert is written by one of the ranks that hold it.

    balanced: whether a policy moves the selection bias. No rank gathers another's experts. The folder is complete
    when the call returns on any rank. The tensors keep their dtype, which config.json names.
    """
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in folder.glob("*.safetensors"):  # of an earlier save, perhaps on more ranks
            shard.unlink()
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
    that is none.
    """
    config, rule = read_config(folder)
    model = empty_model(config, rule, mesh)
    materialise(model)
    for layer in find_layers(model):
        layer.router.reset_state()
    fill_weights(model, mesh, folder)
    return model


def fill_weights(model: PreTrainedModel, mesh: Mesh, folder: Path, masters: ElementReader | None = None) -> None:
    """Copy the tensors of `folder` into `model`, the experts of this rank alone; WeightsError as `load_weights`.

    masters: where fp32 weights are found, which are taken before those of the folder.
    """
    adapter, layers = adapter_of(model.config.model_type), find_layers(model)
    wanted = dict(_expert_tensors(layers, mesh))
    stored_bias = _bias_name(adapter, own_type=_raw_config(folder)["model_type"].startswith(OWN_PREFIX))
    wanted |= dict(_dense_tensors(model, layers, stored_bias))
    found = _tensor_files(folder)
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(name for name in set(found) - set(wanted) if not _is_other_expert(name, layers))
    if missing or unexpected:
        raise WeightsError(
            f"{folder} does not fit {model.config.model_type}: missing {missing or 'nothing'}, unexpected "
            f"{unexpected or 'nothing'}; use the folder of one complete checkpoint"
        )
    _copy(folder, found, wanted)
    for name, tensor in wanted.items():
        if masters is not None and masters.holds(MASTER, name):
            tensor.copy_(masters.read(MASTER, name, 0, tensor.numel()).view_as(tensor))


def named_parameters(model: PreTrainedModel, mesh: Mesh) -> list[Named]:
    """Every tensor of the folder that is a parameter or a part of one on this rank, and where it lies there."""
    named = [
        Named(name, parameter, 0, parameter.numel())
        for name, parameter in model.named_parameters()
        if ".experts.local." not in name
    ]
    for layer in find_layers(model):
        up, down = layer.experts.local.gate_up_proj, layer.experts.local.down_proj
        size = down[0].numel()
        for place, prefix in _local_experts(layer, mesh):
            named.append(Named(f"{prefix}.gate_proj.weight", up, 2 * place * size, size))
            named.append(Named(f"{prefix}.up_proj.weight", up, (2 * place + 1) * size, size))
            named.append(Named(f"{prefix}.down_proj.weight", down, place * size, size))
    return named


def expressible(config: PretrainedConfig, rule: Rule, biased: bool) -> bool:
    """Whether plain `transformers` computes the same routing from the family's own config and weights."""
    bias_has_a_place = adapter_of(config.model_type).bias is not None
    return not _beyond(config, rule) and (bias_has_a_place or not biased)


def read_config(folder: Path) -> tuple[PretrainedConfig, Rule]:
    """The Hugging Face config of a weights folder, ours or theirs, and its rule of routing."""
    raw = _raw_config(folder)
    ours = raw.pop("dist_moe", {})
    model_type = raw.pop("model_type").removeprefix(OWN_PREFIX)
    adapter = adapter_of(model_type)
    config = AutoConfig.for_model(model_type, **raw)
    kind = RULES[ours.pop("selection", "top_k")]
    if kind is not TopK:
        return config, kind(**ours)
    return config, replace(family_rule(config, adapter.score), **ours)


def _beyond(config: PretrainedConfig, rule: Rule) -> dict[str, Any]:
    """What config.json has to say of `rule`, because the family computes something else from its own fields."""
    if not isinstance(rule, TopK):
        kind = next(name for name, known in RULES.items() if isinstance(rule, known))
        return {"selection": kind, **asdict(rule)}
    stated = asdict(family_rule(config, adapter_of(config.model_type).score))
    return {name: value for name, value in asdict(rule).items() if value != stated[name]}


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json; give the step-NNNNNN folder of a run, or its model folder")
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw["model_type"], str):
            raise TypeError(f"model_type={raw['model_type']}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is no Hugging Face config ({error!r}); use another checkpoint") from None
    return raw


def _bias_name(adapter: Adapter, own_type: bool) -> str | None:
    """Under which name the selection bias stands in the files; None where they have none."""
    return adapter.bias or ("selection_bias" if own_type else None)


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


def _is_other_expert(name: str, layers: list[MoeLayer]) -> bool:
    """Whether a name is that of an expert which exists, but on another rank."""
    match = re.fullmatch(r"(.+)\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight", name)
    return match is not None and any(
        layer.name == match[1] and int(match[2]) < layer.experts.experts for layer in layers
    )


def _tensor_files(folder: Path) -> dict[str, str]:
    """Name of each stored tensor -> the file that holds it."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path.name)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read ({error}); use another checkpoint") from None
    if not found:
        raise WeightsError(
            f"{folder} holds no *.safetensors; give the step-NNNNNN folder of a run, or its model folder"
        )
    return found


def _copy(folder: Path, found: dict[str, str], wanted: dict[str, Tensor]) -> None:
    misshapen = []
    for name, stored in _stored(folder, found, list(wanted)):
        if stored.shape != wanted[name].shape:
            misshapen.append(f"{name} {list(stored.shape)} instead of {list(wanted[name].shape)}")
        else:
            wanted[name].copy_(stored)
    if misshapen:
        raise WeightsError(f"{folder} holds tensors of another shape: {misshapen}; its config.json is of another model")


def _stored(folder: Path, found: dict[str, str], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each of `names`, file by file; each file is opened once and nothing else of it is read."""
    for file_name in sorted({found[name] for name in names}):
        with safe_open(folder / file_name, framework="pt") as file:
            for name in (name for name in names if found[name] == file_name):
                yield name, file.get_tensor(name)


def stored_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each of `names` in the folder, as it is stored. Errors: WeightsError where one is missing."""
    found, wanted = _tensor_files(folder), sorted(set(names))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise WeightsError(f"{folder} lacks {missing}; use the folder of one complete checkpoint")
    return _stored(folder, found, wanted)


def write_index(folder: Path) -> Path:
    """Write which tensor lies in which of the folder's files, and the bytes of all -> the index."""
    files = _tensor_files(folder)
    total = sum(_tensor_bytes(folder / name) for name in set(files.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder / INDEX


def _tensor_bytes(path: Path) -> int:
    """What a safetensors file holds beside its header, whose length stands first (8 bytes)."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1)) if dist.get_backend() == "gloo" else dist.barrier()
