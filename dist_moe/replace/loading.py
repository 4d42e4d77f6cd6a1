"""Loads a folder of Hugging Face with the experts of this rank alone."""

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from dist_moe.checkpoint.format.hf_weights import load_weights, read_config
from dist_moe.families.registry import family_of
from dist_moe.replace.parallel import Degree, mesh_of, prepare

GENERATION = "generation_config.json"


def from_pretrained(
    folder: str | Path, expert_parallel: Degree = "auto", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a MoE model from a folder with its experts distributed over the ranks. Collective.

    Each rank reads its experts only, so that no rank needs memory for the whole model. Otherwise as `parallelize`.
    Folders with a `model_type` of this package, such as those of `dist-moe train` with a selection bias or threshold
    routing, are opened, too, with their routing; a target for the threshold has to be given again, by `route`.

    Args:
        folder: Of a family that `dist-moe train` trains (docs/families.md), on a disk.
        expert_parallel: As of `parallelize`; 1 for a model whose ranks each have all experts.
        dtype: Of the weights; selection biases stay in fp32.

    Returns:
        The model on the CPU, in evaluation mode as transformers' `from_pretrained` returns it.

    Raises:
        WeightsError: The folder is not one of a known family, or its files do not match its config.json.
        UserError: The experts cannot be divided.
    """
    path = Path(folder)
    config, _ = read_config(path)
    mesh = mesh_of([int(getattr(config, family_of(config.model_type).experts_key))], expert_parallel)
    model = load_weights(path, mesh)
    nn.Module.to(model, dtype)
    if (path / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    prepare(model, mesh)
    return model.eval()
