"""Writes a checkpoint's weights as the family's own class of transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_folder import read_raw_config
from dist_moe.checkpoint.format.hf_weights import load_weights, read_config, remove_weights
from dist_moe.checkpoint.format.model_tensors import SINGLE_RANK, in_memory_tensors
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.inspect import BIAS_PATTERN
from dist_moe.config.model import known_keys
from dist_moe.families.composite import find_composite
from dist_moe.families.model_class import find_model_class, model_class
from dist_moe.families.registry import family_of
from dist_moe.model.build import family_rule
from dist_moe.model.head import attach_head, has_head
from dist_moe.moe.select import Rule
from dist_moe.text import listed

LARGEST_FILE = "50GB"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_plain(model: Path, out: Path, dtype: str, masters: ShardReader | None, whole: Path | None = None) -> bool:
    """Write the folder that transformers opens; memory holds the model twice.

    Args:
        model: A weights folder.
        out: An empty folder.
        dtype: fp32, bf16, or keep.
        masters: Of the optimizer, whose weights are preferred.
        whole: The folder of a multimodal model, of which this is the language model; the weights of other modalities
            are taken from there. None: the language model is written alone.

    Returns:
        Whether selection biases were left out, for which the family has no place.

    Raises:
        CheckpointError: The family computes another function.
        WeightsError: As `load_weights`.
    """
    config, rule = read_config(model)
    _check_plain(config, rule, model, whole)
    ours = load_weights(model, SINGLE_RANK, masters)
    tensors, left_out = in_memory_tensors(ours)
    stored_dtype = DTYPES.get(dtype) or config.dtype or torch.float32
    for name, tensor in tensors.items():
        # A selection bias in bf16 would lose the 0.001 that one step adds to it.
        if tensor.is_floating_point() and not BIAS_PATTERN.fullmatch(name):
            tensors[name] = tensor.to(stored_dtype)
    if whole is None:
        generation = GenerationConfig.from_model_config(config)
        kind = model_class(config, family_of(config.model_type).encoder)
        write_by_class(kind, config, tensors, stored_dtype, generation, out, headed=has_head(config))
    else:
        _write_composite(whole, config, tensors, stored_dtype, out)
    return any(bool(layer.router.selection_bias.any()) for layer in left_out)


def write_by_class(
    kind: Any,
    config: PretrainedConfig,
    state: dict[str, Tensor],
    dtype: torch.dtype | str,
    generation: Any,
    out: Path,
    headed: bool = False,
) -> None:
    """Write the folder that a class of transformers saves.

    Args:
        kind: The class.
        config: Of the model.
        state: By the names of the class in memory; others are left out.
        dtype: What config.json names.
        generation: The settings of generation; None for none.
        out: The folder. Weights that it has are replaced.
        headed: Whether the head of this package is added, which the class does not read.

    Raises:
        CheckpointError: The state lacks a tensor.
    """
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config)
        if headed:
            attach_head(model)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise CheckpointError(f"the model has no values for {missing[:3]}, which {kind.__name__} stores")
    model.config.dtype = dtype
    model.generation_config = generation
    remove_weights(out)
    model.save_pretrained(out, max_shard_size=LARGEST_FILE)


def _write_composite(
    whole: Path, config: PretrainedConfig, tensors: dict[str, Tensor], dtype: torch.dtype | str, out: Path
) -> None:
    """Write a multimodal model with the tensors of its language model replaced; the others are those of the folder."""
    _check_same_model(whole, config)
    composite = find_composite(read_raw_config(whole))
    state = {composite.name_of(name): tensor for name, tensor in tensors.items()}
    try:
        loaded = type(composite.model).from_pretrained(whole, dtype=dtype, output_loading_info=True)
    except Exception as error:  # the class of another library may raise anything
        raise CheckpointError(f"{whole} cannot be read ({type(error).__name__}: {error}); restore it") from None
    model, found = loaded
    lacking = {name for key in ("missing_keys", "mismatched_keys") for name in map(_name_in, found[key])} - state.keys()
    if lacking or found["error_msgs"]:
        raise CheckpointError(
            f"{whole} lacks {listed(sorted(lacking), most=3) or found['error_msgs'][0]}; restore the folder that the "
            "run started from"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(out, max_shard_size=LARGEST_FILE)


def _name_in(key: Any) -> str:
    """Return the name of a tensor that transformers reports, with or without its shapes."""
    return key if isinstance(key, str) else str(key[0])


def _check_same_model(whole: Path, config: PretrainedConfig) -> None:
    """Raise CheckpointError where the folder has another language model than the checkpoint."""
    stored = read_config(whole)[0]
    now, then = stored.to_dict(), config.to_dict()
    known = known_keys(type(config), family_of(config.model_type)) & now.keys() & then.keys()
    what = listed(sorted(key for key in known if now[key] != then[key]), most=3)
    if stored.model_type != config.model_type:
        what = f"model_type={stored.model_type}"
    if what:
        raise CheckpointError(
            f"{whole} has another language model than the checkpoint ({what} differs); restore the folder that the run "
            "started from"
        )


def _check_plain(config: PretrainedConfig, rule: Rule, model: Path, whole: Path | None) -> None:
    """Raise CheckpointError where the class of transformers would compute something else."""
    family = family_of(config.model_type)
    if whole is None and find_model_class(config, family.encoder) is None:
        raise CheckpointError(
            f"transformers has the {config.model_type} of {model} only as a part of a multimodal model, whose other "
            "weights --plain takes from the folder of model.pretrained, which cannot be read or is not that of one; "
            "restore it, or leave out --plain"
        )
    if family.feed_forward is not None or (has_head(config) and not family.encoder):
        raise CheckpointError(
            f"transformers has no class for the {config.model_type} of {model}; export without --plain"
        )
    if rule != family_rule(config, family.score):
        raise CheckpointError(
            f"the routing of {model} is {rule}, which {config.model_type} cannot express; export without --plain"
        )
