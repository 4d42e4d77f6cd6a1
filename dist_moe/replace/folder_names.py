"""Loads states with the names of a folder into a model whose routers or experts are of this package."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.checkpoint.format.model_tensors import dense_tensors, expert_tensors
from dist_moe.errors import UserError
from dist_moe.model.convert import find_layers
from dist_moe.replace.experts import placed_layers
from dist_moe.replace.saving import is_routed


def read_folder_names(model: nn.Module) -> None:
    """Let `load_state_dict` take the tensors of a folder that the model's own `save_pretrained` has written.

    A Trainer loads such a state when it resumes, without an error for what does not match: it would continue with other
    experts and routers.
    """
    model.register_load_state_dict_pre_hook(_take_names)


@torch.no_grad()
def _take_names(
    model: nn.Module, state: dict[str, Tensor], prefix: str, local: Any, strict: bool, missing: list[str], *_: Any
) -> None:
    """Replace a state with the names of a folder by one with those of the model.

    Raises:
        UserError: It has no experts of either names.
    """
    layers = placed_layers(model)
    blocks = tuple(f"{prefix}{name.rpartition('.')[0]}." for name in layers)
    of_blocks = [key for key in state if key.startswith(blocks)]
    if not of_blocks or any(".experts.local." in key for key in of_blocks):
        return  # a state of other weights, such as adapters, or of this model
    wanted: dict[str, Tensor] = {}
    if is_routed(model) and isinstance(model, PreTrainedModel) and not prefix:
        converted, mesh = find_layers(model), next(iter(layers.values())).mesh
        wanted = dict(expert_tensors(converted, mesh)) | dict(dense_tensors(model, converted, own_type=True))
    if not wanted or not wanted.keys() <= state.keys():
        raise UserError(
            "the state has no experts under the names of this model; load the folder by dist_moe.from_pretrained, and "
            "give that model to the Trainer, or load the state of a model that was made in the same way"
        )
    for name, tensor in wanted.items():
        tensor.copy_(state[name])
    state.clear()
    state.update(model.state_dict())
