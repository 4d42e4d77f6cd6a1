"""Writes a checkpoint's weights as the family's own class of transformers saves them."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_weights import load_weights, read_config
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
    with torch.device("meta"):
        theirs: PreTrainedModel = language_model_class(config)._from_config(config)
    state: dict[str, Tensor] = {}
    for name in theirs.state_dict():
        if name in tensors:
            # A selection bias in bf16 would lose the 0.001 that one step adds to it.
            is_weight = tensors[name].is_floating_point() and not BIAS_PATTERN.fullmatch(name)
            state[name] = tensors[name].to(stored_dtype) if is_weight else tensors[name]
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    missing = [name for name, tensor in theirs.state_dict().items() if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{model} has no values for {missing[:3]}, which the {config.model_type} class stores")
    theirs.config.dtype = stored_dtype
    theirs.generation_config = GenerationConfig.from_model_config(config)
    theirs.save_pretrained(out, max_shard_size=LARGEST_FILE)
    return any(bool(layer.router.selection_bias.any()) for layer in left_out)


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
