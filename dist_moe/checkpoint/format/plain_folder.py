"""Writes a checkpoint's weights as the family's own class of transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_weights import load_weights, read_config, remove_weights
from dist_moe.checkpoint.format.model_tensors import SINGLE_RANK, in_memory_tensors
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.inspect import BIAS_PATTERN
from dist_moe.families.model_class import language_model_class
from dist_moe.families.registry import family_of
from dist_moe.model.build import family_rule
from dist_moe.model.head import has_head
from dist_moe.moe.select import Rule

LARGEST_FILE = "50GB"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_plain(model: Path, out: Path, dtype: str, masters: ShardReader | None) -> bool:
    """Write the folder that transformers opens; memory holds the model twice.

    Args:
        model: A weights folder.
        out: An empty folder.
        dtype: fp32, bf16, or keep.
        masters: Of the optimizer, whose weights are preferred.

    Returns:
        Whether selection biases were left out, for which the family has no place.

    Raises:
        CheckpointError: The family computes another function.
        WeightsError: As `load_weights`.
    """
    config, rule = read_config(model)
    _check_plain(config, rule, model)
    ours = load_weights(model, SINGLE_RANK, masters)
    tensors, left_out = in_memory_tensors(ours)
    stored_dtype = DTYPES.get(dtype) or config.dtype or torch.float32
    for name, tensor in tensors.items():
        # A selection bias in bf16 would lose the 0.001 that one step adds to it.
        if tensor.is_floating_point() and not BIAS_PATTERN.fullmatch(name):
            tensors[name] = tensor.to(stored_dtype)
    generation = GenerationConfig.from_model_config(config)
    write_by_class(language_model_class(config), config, tensors, stored_dtype, generation, out)
    return any(bool(layer.router.selection_bias.any()) for layer in left_out)


def write_by_class(
    kind: Any, config: PretrainedConfig, state: dict[str, Tensor], dtype: torch.dtype | str, generation: Any, out: Path
) -> None:
    """Write the folder that a class of transformers saves.

    Args:
        kind: The class.
        config: Of the model.
        state: By the names of the class in memory; others are left out.
        dtype: What config.json names.
        generation: The settings of generation; None for none.
        out: The folder. Weights that it has are replaced.

    Raises:
        CheckpointError: The state lacks a tensor.
    """
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise CheckpointError(f"the model has no values for {missing[:3]}, which {kind.__name__} stores")
    model.config.dtype = dtype
    model.generation_config = generation
    remove_weights(out)
    model.save_pretrained(out, max_shard_size=LARGEST_FILE)


def _check_plain(config: PretrainedConfig, rule: Rule, model: Path) -> None:
    """Raise CheckpointError where the class of transformers would compute something else."""
    family = family_of(config.model_type)
    if family.feed_forward is not None or has_head(config):
        raise CheckpointError(
            f"transformers has no class for the {config.model_type} of {model}; export without --plain"
        )
    if rule != family_rule(config, family.score):
        raise CheckpointError(
            f"the routing of {model} is {rule}, which {config.model_type} cannot express; export without --plain"
        )
