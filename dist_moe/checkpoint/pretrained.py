"""Starts a run from the weights of a Hugging Face folder."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.dense_folder import Upcycling, fill_upcycled
from dist_moe.checkpoint.format.hf_weights import fill_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.config.pretrained import is_model_folder

GONE = "the folder does not exist, and there is no checkpoint to resume from; restore it"


@torch.no_grad()
def load_pretrained(folder: Path, model: PreTrainedModel, mesh: Mesh) -> None:
    """Copy the folder's weights, in fp32, into a model that no engine wraps yet. A collective call.

    Each rank reads the dense tensors and its own experts.

    Raises:
        CheckpointError: On every rank, if one finds missing, unexpected or misshapen tensors.
    """

    def copy() -> None:
        if not is_model_folder(folder):
            raise WeightsError(GONE)
        fill_weights(model, mesh, folder)

    run_on_all_ranks(mesh, f"the run cannot start from model.pretrained={folder}", copy)


def load_upcycled(folder: Path, model: PreTrainedModel, mesh: Mesh, upcycling: Upcycling) -> None:
    """Copy the weights of a dense model, in fp32, into the MoE model that is made of it. A collective call.

    Each rank reads the dense tensors, one at a time, and makes its own experts.

    Raises:
        CheckpointError: On every rank, if one finds missing, unexpected or misshapen tensors.
    """

    def copy() -> None:
        if not is_model_folder(folder):
            raise WeightsError(GONE)
        fill_upcycled(model, mesh, folder, upcycling)

    run_on_all_ranks(mesh, f"the run cannot start from model.upcycle_from={folder}", copy)
