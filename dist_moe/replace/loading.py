"""Loads a folder of Hugging Face with the experts of this rank alone."""

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.hf_folder import read_raw_config
from dist_moe.checkpoint.format.hf_weights import TARGET, load_weights, read_config
from dist_moe.config.pretrained import SECTION
from dist_moe.families.registry import family_of
from dist_moe.model.convert import find_layers
from dist_moe.replace.parallel import Degree, mesh_of, prepare

GENERATION = "generation_config.json"


def from_pretrained(
    folder: str | Path, expert_parallel: Degree = "auto", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a MoE model from a folder with its experts distributed over the ranks. Collective.

    Each rank reads its experts only, so that no rank needs memory for the whole model. Otherwise as `parallelize`.
    Folders with a `model_type` of this package, such as those of `dist-moe train` with a selection bias or threshold
    routing, are opened, too, with their routing, and with the target of `route` for the threshold.

    Args:
        folder: Of a family that `dist-moe train` trains (docs/families.md), on a disk.
        expert_parallel: As of `parallelize`; 1 for a model whose ranks each have all experts.
        dtype: Of the weights; selection biases stay in fp32.

    Returns:
        The model on the CPU, in evaluation mode as transformers' `from_pretrained` returns it.

    Raises:
        WeightsError: The folder is not one of a known family, or its files do not match its config.json, or that has
            an impossible target.
        UserError: The experts cannot be divided.
    """
    path = Path(folder)
    config, _ = read_config(path)
    mesh = mesh_of([int(getattr(config, family_of(config.model_type).experts_key))], expert_parallel)
    model = load_weights(path, mesh)
    _set_target(model, path)
    nn.Module.to(model, dtype)
    if (path / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    prepare(model, mesh)
    return model.eval()


def _set_target(model: nn.Module, folder: Path) -> None:
    """Let a balancer control the threshold to what `route` was given when the folder was written."""
    target = read_raw_config(folder).get(SECTION, {}).get(TARGET)
    if target is None:
        return
    for layer in find_layers(model):
        if layer.router.is_fixed:
            continue
        if type(target) not in (int, float) or not 0 < target <= layer.router.max_experts_per_token:
            raise WeightsError(
                f"{folder / 'config.json'} has {SECTION}.{TARGET}={target!r}, which is not a number of experts of "
                f"{layer.router.max_experts_per_token}; correct it, or use another folder"
            )
        layer.router.target_experts_per_token = float(target)
