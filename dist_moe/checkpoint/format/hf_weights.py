"""Saves and loads weights as a Hugging Face folder: what `save_pretrained` would write, sharded by who holds what.

Names on disk follow Hugging Face: one expert's weights are three tensors (gate, up, down), with the global id of the
expert in the name. Where the architecture cannot express the routing (a selection bias, another gate function, a
scaling factor in a family without one), the folder has a `model_type` of its own, so that plain `transformers` refuses
it rather than compute another function, and the section `dist_moe` of config.json has what the family's own fields
cannot express.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.family_names import NO_NAMES, FamilyNames
from dist_moe.checkpoint.format.hf_folder import (
    INDEX_NAME,
    LayerExperts,
    TensorSource,
    find_sources,
    further_layers,
    parts_in_files,
    read_headers,
    read_raw_config,
    read_sources,
)
from dist_moe.checkpoint.format.model_tensors import (
    dense_tensors,
    expert_tensors,
    family_layout,
    family_names,
    stored_biases,
)
from dist_moe.checkpoint.format.shard_reader import ShardReader, write_tensors
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Resolved
from dist_moe.config.pretrained import OWN_PREFIX, SECTION
from dist_moe.engine.optimizer_shards import MASTER
from dist_moe.families.composite import is_composite, language_model_settings
from dist_moe.families.model_class import find_model_class, is_part, model_class
from dist_moe.families.registry import family_of
from dist_moe.files import write_atomically
from dist_moe.model.build import empty_model, family_rule, materialize, routing_rule
from dist_moe.model.convert import MoeLayer, find_layers
from dist_moe.model.family.hash_router import HashRouter
from dist_moe.model.head import HEAD_TENSOR, LANGUAGE_MODEL_HEAD, describe_head, has_head, problem_of
from dist_moe.moe.select import ExpertThreshold, RandomRouting, Rule, ThresholdRouting, TopK
from dist_moe.text import counted

TARGET = "target_experts_per_token"  # key in SECTION
# The names of selection rules in config.json; "forced" is random routing, by its name in the first version.
RULES: dict[str, type[Rule]] = {
    "top_k": TopK,
    "threshold": ThresholdRouting,
    "expert_threshold": ExpertThreshold,
    "forced": RandomRouting,
}
# Fields of rules in config.json by the names that earlier versions wrote. The field names of the dataclasses in
# moe/select.py are part of the format.
EARLIER_FIELDS = {
    "normalise": "normalize",
    "scaling": "routed_scaling_factor",
    "top_groups": "topk_groups",
    "shapes_mixture": "bias_in_gate_weights",
    "skew": "zipf_exponent",
}


def save_weights(model: PreTrainedModel, mesh: Mesh, folder: Path, balanced: bool) -> None:
    """Write `folder`, complete on every rank when the call returns. A collective call.

    Each expert is written by one of the ranks that hold it; no rank gathers another's experts.

    Args:
        model: Its tensors keep their dtype, which config.json names.
        mesh: The ranks.
        folder: Created if needed; the files of an earlier save are replaced.
        balanced: Whether a policy updates the selection bias.
    """
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        remove_weights(folder)
    _barrier(mesh)
    for name, tensors in shard_tensors(model, mesh, balanced).items():
        write_tensors(folder / name, tensors)
    _barrier(mesh)
    if mesh.rank == 0:
        for name, text in config_files(model, balanced).items():
            write_atomically(folder / name, text)
        write_index(folder)
    _barrier(mesh)


def remove_weights(folder: Path) -> None:
    """Remove the files of an earlier save, which may be more than the next one will write."""
    for old in (*folder.glob("model*.safetensors"), folder / INDEX_NAME):
        old.unlink(missing_ok=True)


def shard_tensors(model: PreTrainedModel, mesh: Mesh, balanced: bool) -> dict[str, dict[str, Tensor]]:
    """Views of the parameters that this rank writes, by file and name; empty if another rank writes the same."""
    if mesh.edp_rank != 0:
        return {}
    layers = find_layers(model)
    own_type = _needs_own_type(model, layers, balanced)
    tensors = dict(expert_tensors(layers, mesh))
    if mesh.ep_rank == 0:
        tensors |= dict(dense_tensors(model, layers, own_type))
    if not own_type and (layout := family_layout(model.config)) is not None:
        tensors = {layout.names.stored[name]: tensor for name, tensor in tensors.items()}
    return {f"model-{mesh.ep_rank + 1:05d}-of-{mesh.expert_parallel:05d}.safetensors": tensors}


def config_files(model: PreTrainedModel, balanced: bool) -> dict[str, str]:
    """The texts of config.json and generation_config.json, by file name."""
    layers = find_layers(model)
    rule = layers[0].router.rule
    raw = PretrainedConfig._encode_special_floats(model.config.to_diff_dict())
    raw["architectures"] = [type(model).__name__]
    raw["dtype"] = str(model.dtype).removeprefix("torch.")
    if _needs_own_type(model, layers, balanced):
        raw["model_type"] = OWN_PREFIX + model.config.model_type
        target = layers[0].router.target_experts_per_token
        raw[SECTION] = _rule_overrides(model.config, rule) | ({} if target is None else {TARGET: target})
    generation = GenerationConfig.from_model_config(model.config)
    return {
        "config.json": json.dumps(raw, indent=2, sort_keys=True) + "\n",
        "generation_config.json": generation.to_json_string(),
    }


def _needs_own_type(model: PreTrainedModel, layers: list[MoeLayer], balanced: bool) -> bool:
    """Whether plain `transformers` would compute another function with the family's own `model_type`."""
    biased = balanced or any(bool(layer.router.selection_bias.any()) for layer in layers)
    return not is_expressible(model.config, layers[0].router.rule, biased)


def own_type_of_model(model: PreTrainedModel, balanced: bool) -> str:
    """Say in a line that the model will be saved with a `model_type` of its own; "" if it will not."""
    own = _needs_own_type(model, find_layers(model), balanced)
    return own_type_line(model.config.model_type, has_head(model.config)) if own else ""


def own_type_of_run(resolved: Resolved) -> str:
    """As `own_type_of_model`, from the configuration of a run."""
    config = resolved.config
    settings = CONFIG_MAPPING[config.model.architecture](**resolved.model_config)
    if config.task.kind != "language_model":
        return own_type_line(config.model.architecture, headed=True)
    rule = routing_rule(config.router, config.balance, config.model.architecture)
    expressible = is_expressible(settings, rule, config.balance.moves_bias)
    return "" if expressible else own_type_line(config.model.architecture)


def own_type_line(architecture: str, headed: bool = False) -> str:
    """Say in a line what follows from a `model_type` of its own; headed: the model classifies."""
    if family_of(architecture).feed_forward is not None:
        return (
            f"{architecture} has no experts: saved weights have the model_type {OWN_PREFIX}{architecture}, which "
            "dist-moe opens, also as model.pretrained, and transformers does not (docs/upcycling.md)"
        )
    if not headed and is_part(architecture):
        return (
            f"transformers has {architecture} only as a part of a multimodal model: saved weights have the model_type "
            f"{OWN_PREFIX}{architecture}, which dist-moe opens and transformers does not (docs/checkpoints.md, A "
            "multimodal model)"
        )
    what = "has no class with this head" if headed else "cannot express this routing"
    return (
        f"{architecture} {what}: saved weights have the model_type {OWN_PREFIX}{architecture}, "
        "which dist-moe opens and transformers does not (docs/checkpoints.md, A model type of its own)"
    )


def load_weights(folder: Path, mesh: Mesh, masters: ShardReader | None = None) -> PreTrainedModel:
    """Load a folder written by `save_weights`, or by `save_pretrained` of a known family.

    Only this rank's experts are read. Memory is allocated after the files were checked to hold what config.json says.

    Args:
        folder: The folder.
        mesh: Which rank holds which experts.
        masters: As of `fill_weights`.

    Returns:
        A model on the CPU in fp32.

    Raises:
        WeightsError: With every missing and unexpected tensor; or the folder is not a weights folder.
    """
    config, rule = read_config(folder)
    model = build_empty_model(config, rule, mesh, folder)
    find_weights(model, mesh, folder)
    materialize(model)
    for layer in find_layers(model):
        layer.router.reset_state()
    fill_weights(model, mesh, folder, masters)
    return model


def fill_weights(model: PreTrainedModel, mesh: Mesh, folder: Path, masters: ShardReader | None = None) -> None:
    """Copy the tensors of `folder` into `model`, of the experts only this rank's.

    Args:
        model: Built for `mesh`.
        mesh: The ranks.
        folder: A weights folder.
        masters: Shards of an optimizer; fp32 master weights are preferred over the folder's.

    Raises:
        WeightsError: As `load_weights`.
    """
    wanted = _rank_tensors(model, mesh, folder)
    parts = parts_in_files(wanted, names_of(folder, model.config))
    for name, stored in read_sources(find_weights(model, mesh, folder)):
        parts[name].copy_(stored)
    for name, tensor in wanted.items():
        if masters is not None and masters.has(MASTER, name):
            tensor.copy_(masters.read(MASTER, name, 0, tensor.numel()).view_as(tensor))
    for layer in find_layers(model):
        if isinstance(layer.router, HashRouter) and (problem := layer.router.problem_of_table()):
            raise WeightsError(f"{folder}: {layer.name}: {problem}; use another checkpoint")


def find_weights(model: PreTrainedModel, mesh: Mesh, folder: Path) -> dict[str, TensorSource]:
    """Find where the folder holds each tensor of this rank.

    Raises:
        WeightsError: With everything that does not match the model.
    """
    experts = {
        layer.name: LayerExperts(layer.experts.num_experts, tuple(layer.experts.local.parts))
        for layer in find_layers(model)
    }
    wanted, raw = _rank_tensors(model, mesh, folder), read_raw_config(folder)
    names = names_of(folder, model.config)
    # What the class itself ignores, such as DeepSeek-V3's layer that predicts further tokens.
    ignored = list(model._keys_to_ignore_on_load_unexpected or ())
    if is_multimodal := is_composite(raw):
        ignored += further_layers(names, model.config.num_hidden_layers)
    if has_head(model.config):
        if problem_of(raw) is not None:
            _check_head(model.config, folder)
        else:
            # A model without this head, whose own head has no place in a model that classifies.
            del wanted[HEAD_TENSOR]
            ignored.append(LANGUAGE_MODEL_HEAD)
    ignored += [rf"^(?!{re.escape(names.base)})"] if names.base else []  # the head of a class of transformers
    return find_sources(folder, parts_in_files(wanted, names), experts, ignored, names, is_multimodal)


def _check_head(config: PretrainedConfig, folder: Path) -> None:
    """Raise WeightsError where the rows of the folder's head are of other classes, or it sees another pooling."""
    stored_config, _ = read_config(folder)
    try:
        stored = describe_head(stored_config)
    except ValueError as error:
        raise WeightsError(f"{folder / 'config.json'} cannot be used ({error}); use another checkpoint") from None
    if (expected := describe_head(config)) != stored:
        raise WeightsError(
            f"{folder} holds a head for {stored}, which differs from the {expected} of the run; set task.labels and "
            "task.pooling to those of the folder"
        )


def _rank_tensors(model: PreTrainedModel, mesh: Mesh, folder: Path) -> dict[str, Tensor]:
    """The tensors of this rank by their names in the folder."""
    layers = find_layers(model)
    return dict(expert_tensors(layers, mesh)) | dict(dense_tensors(model, layers, _has_own_type(folder)))


def build_empty_model(config: PretrainedConfig, rule: Rule, mesh: Mesh, folder: Path) -> PreTrainedModel:
    """Build the model of the folder's config on the meta device, without memory for its parameters.

    Raises:
        WeightsError: No model can be built from the config, or it has more layers or experts than the files can hold.
    """
    stored, experts = read_headers(folder).values(), family_of(config.model_type).experts_key
    limit = len(stored) + max((tensor.shape[0] for tensor in stored if len(tensor.shape) > 2), default=0)
    try:
        # Modules take memory even on the meta device: an untrusted config could ask for billions of layers.
        for name in ("num_hidden_layers", experts):
            if getattr(config, name) > limit:
                raise ValueError(f"{name}={getattr(config, name)}, with {counted(len(stored), 'tensor')} in the files")
        return empty_model(config, rule, mesh)
    except Exception as error:  # transformers' classes raise errors of any type for invalid values
        raise WeightsError(
            f"{folder / 'config.json'} does not describe a valid model ({error}); use another checkpoint"
        ) from None


def is_expressible(config: PretrainedConfig, rule: Rule, biased: bool) -> bool:
    """Whether plain `transformers` computes the same routing from the family's own config and weights."""
    family = family_of(config.model_type)
    if family.feed_forward is not None or has_head(config) or find_model_class(config, family.encoder) is None:
        return False
    layout = family_layout(config)
    if layout is not None and not layout.names.is_complete:
        return False
    family_has_bias = family.bias_name is not None if layout is None else layout.has_biases
    return not _rule_overrides(config, rule) and (family_has_bias or not biased)


def read_config(folder: Path) -> tuple[PretrainedConfig, Rule]:
    """Read config.json of a folder of ours or of Hugging Face.

    Returns:
        The family's config, and the routing rule; of a multimodal model, those of its language model.

    Raises:
        WeightsError: It is missing or invalid, or of an unknown family.
    """
    raw = read_raw_config(folder)
    overrides = raw.pop(SECTION, {})
    try:
        raw = language_model_settings(raw)
        model_type = raw.pop("model_type").removeprefix(OWN_PREFIX)
        family = family_of(model_type)
        overrides = {EARLIER_FIELDS.get(name, name): value for name, value in overrides.items() if name != TARGET}
        config = CONFIG_MAPPING[model_type].from_dict(PretrainedConfig._decode_special_floats(raw))
        kind = RULES[overrides.pop("selection", "top_k")]
        if kind is not TopK:
            return config, kind(**overrides)
        return config, replace(family_rule(config, family.score), **overrides)
    except Exception as error:  # transformers' classes raise errors of any type for invalid values
        reason = " ".join(str(error.__cause__ or error).split())
        raise WeightsError(f"{folder / 'config.json'} cannot be used ({reason}); use another checkpoint") from None


def _rule_overrides(config: PretrainedConfig, rule: Rule) -> dict[str, Any]:
    """The fields of `rule` that differ from what the family computes from its own config."""
    if not isinstance(rule, TopK):
        kind = next(name for name, known in RULES.items() if isinstance(rule, known))
        return {"selection": kind, **asdict(rule)}
    family_fields = asdict(family_rule(config, family_of(config.model_type).score))
    return {name: value for name, value in asdict(rule).items() if value != family_fields[name]}


def names_in_files(folder: Path) -> dict[str, str]:
    """Return the names in the files of a folder by those of this package, where they differ."""
    return dict(names_of(folder, read_config(folder)[0]).stored)


def names_of(folder: Path, config: PretrainedConfig) -> FamilyNames:
    """Return the names of tensors in a folder that differ from those of this package.

    Raises:
        WeightsError: It is a multimodal model in which the language model is not found.
    """
    raw = read_raw_config(folder)
    if raw["model_type"].startswith(OWN_PREFIX):
        return NO_NAMES
    try:
        found = family_names(config, raw) or NO_NAMES
    except ValueError as error:
        raise WeightsError(f"{folder} cannot be used ({error}); give another folder") from None
    return found.below(prefix) if (prefix := _prefix_in(folder, config)) else found


def _prefix_in(folder: Path, config: PretrainedConfig) -> str:
    """Return what the names of an encoder begin with in a folder of transformers: not empty in one with any head."""
    family = family_of(config.model_type)
    if not family.encoder or not family.is_probed or _has_own_type(folder):
        return ""
    prefix = f"{model_class(config, is_encoder=True).base_model_prefix}."
    return prefix if any(name.startswith(prefix) for name in read_headers(folder)) else ""


def _has_own_type(folder: Path) -> bool:
    return bool(read_raw_config(folder)["model_type"].startswith(OWN_PREFIX))


def bias_names(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """The name of each MoE layer's selection bias in the folder, by layer; empty if it stores none."""
    stored = stored_biases(model, _has_own_type(folder))
    names = {id(module): name for name, module in model.named_modules()}
    biases = {layer.name: f"{names[id(layer.router)]}.selection_bias" for layer in find_layers(model)}
    return {layer: stored[bias][0] for layer, bias in biases.items() if bias in stored}


def write_index(folder: Path) -> Path:
    """Write the index of the folder: the file of each tensor, and the total size -> its path."""
    stored_by_name = read_headers(folder)
    total = sum(stored.bytes for stored in stored_by_name.values())
    weight_map = {name: stored.file.name for name, stored in sorted(stored_by_name.items())}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return folder / INDEX_NAME


def _barrier(mesh: Mesh) -> None:
    if mesh.world_size > 1:
        dist.all_reduce(torch.zeros(1)) if dist.get_backend() == "gloo" else dist.barrier()
