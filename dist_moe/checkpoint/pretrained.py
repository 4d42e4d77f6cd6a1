"""Begins a run with the weights of a Hugging Face folder."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.hf_weights import fill_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.config.pretrained import is_there


@torch.no_grad()
def load_pretrained(folder: Path, model: PreTrainedModel, mesh: Mesh) -> None:
    """Copy the folder's weights into a model that no engine has yet, in fp32, the experts of this rank alone.

    A collective call. Errors: CheckpointError on all ranks, where one finds tensors missing, unexpected or misshapen.
    """

    def copy() -> None:
        if not is_there(folder):
            raise WeightsError("it is gone, and there is no checkpoint to go on from; restore it")
        fill_weights(model, mesh, folder)

    run_on_all_ranks(mesh, f"the run cannot begin with model.pretrained={folder}", copy)
