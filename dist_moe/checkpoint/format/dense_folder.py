"""Copies the weights of a dense Hugging Face folder into an MoE model, whose experts start as copies.

Sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.hf_folder import TensorSource, read_headers, read_sources
from dist_moe.checkpoint.format.tensor_header import FLOAT_DTYPES, StoredTensor
from dist_moe.comm.mesh import Mesh
from dist_moe.families.record import FeedForward
from dist_moe.families.registry import family_of
from dist_moe.model.build import derived_seed
from dist_moe.model.convert import MoeLayer, find_layers
from dist_moe.model.head import HEAD_TENSOR, LANGUAGE_MODEL_HEAD, has_head
from dist_moe.text import counted, listed

logger = logging.getLogger(__name__)

NOT_WEIGHTS = re.compile(r"(.+\.)?(position_ids|rotary_emb\.inv_freq)|(.+\.)?pooler\..+")
"""Names that folders have and models need not: buffers of older versions, and the pooling layer of an encoder."""
EARLIER_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Upcycling:
    """How an MoE model is made of a dense one.

    Attributes:
        noise: Standard deviation of the normal noise on each expert's copy of a tensor, relative to the root mean
            square of the tensor.
        router_std: Standard deviation of the routing logits, over experts and tokens.
        seed: Of the noise and of the routers.
    """

    noise: float
    router_std: float
    seed: int


class Copy(NamedTuple):
    """A tensor of the model that a tensor of the folder is copied to.

    Attributes:
        target: Of this rank.
        noise: The name of its noise; "" for a tensor without noise.
    """

    target: Tensor
    noise: str = ""


@torch.no_grad()
def fill_upcycled(model: PreTrainedModel, mesh: Mesh, folder: Path, upcycling: Upcycling) -> None:
    """Copy the tensors of a dense model into `model`, one at a time, and draw the routers.

    Args:
        model: Converted, built for `mesh`, with memory.
        mesh: The ranks; each reads the dense tensors and makes its own experts.
        folder: Of the dense model.
        upcycling: How experts and routers start. Their values do not depend on the mesh.

    Raises:
        WeightsError: With everything that does not match the model.
    """
    feed_forward = family_of(model.config.model_type).feed_forward
    assert feed_forward is not None
    layers = find_layers(model)
    copies = _copies(model, layers, mesh, feed_forward)
    for name, stored in read_sources(_find_sources(folder, copies, model.base_model_prefix)):
        for target, noise in copies[name]:
            target.copy_(stored)
            if noise and upcycling.noise:
                _add_noise(target, upcycling.noise, derived_seed(upcycling.seed, noise))
    for layer in layers:
        dense = model.get_submodule(layer.name.removesuffix(f".{feed_forward.block}"))
        _draw_router(layer, dense.get_submodule(feed_forward.norm), upcycling)


def _copies(
    model: PreTrainedModel, layers: list[MoeLayer], mesh: Mesh, feed_forward: FeedForward
) -> dict[str, list[Copy]]:
    """Return the copies of each tensor of the dense model on this rank, by its name in the dense model."""
    blocks = tuple(f"{layer.name}." for layer in layers)
    elsewhere = [f"{LANGUAGE_MODEL_HEAD}.weight"] if model.config.tie_word_embeddings else []
    elsewhere += [HEAD_TENSOR] if has_head(model.config) else []  # drawn at random
    copies = {
        name: [Copy(tensor)]
        for name, tensor in model.state_dict().items()
        if not name.startswith(blocks) and name not in elsewhere
    }
    for layer in layers:
        dense, local = layer.name.removesuffix(feed_forward.block), layer.experts.local
        for index, expert in enumerate(mesh.local_experts(layer.experts.num_experts)):
            for name, part in local.parts.items():
                projection, _, kind = name.partition(".")
                copy = Copy(part.view(index), f"{layer.name}.expert.{expert}.{name}.noise")
                copies.setdefault(f"{dense}{feed_forward.projections[projection]}.{kind}", []).append(copy)
    return copies


def _find_sources(folder: Path, copies: Mapping[str, list[Copy]], prefix: str) -> dict[str, TensorSource]:
    """Find where each tensor of the dense model is stored.

    Args:
        folder: Its folder, of the model with any head, or of the model without one.
        copies: The tensors that are wanted.
        prefix: The prefix of the names of a model with a head.
    """
    stored = {_present_name(name): tensor for name, tensor in read_headers(folder).items()}
    headed = any(name.startswith(f"{prefix}.") for name in stored)
    found = {}
    for name in copies:
        spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        if (spelled := next((each for each in spellings if each in stored), None)) is not None:
            found[name] = stored[spelled]
    missing = sorted(set(copies) - set(found))
    used = {tensor.name for tensor in found.values()}
    others = [name for name, tensor in stored.items() if tensor.name not in used and not NOT_WEIGHTS.fullmatch(name)]
    heads = [name for name in others if headed and not name.startswith(f"{prefix}.")]
    unexpected = sorted(set(others) - set(heads))
    if missing or unexpected:
        raise WeightsError(
            f"{folder} does not match its config.json: missing {missing or 'nothing'}, unexpected "
            f"{unexpected or 'nothing'}; use the folder of one complete model"
        )
    if heads:
        logger.info("%s of %s are of its head, and not used: %s", counted(len(heads), "tensor"), folder, heads)
    _check(folder, found, copies)
    return {name: TensorSource(tensor) for name, tensor in found.items()}


def _present_name(name: str) -> str:
    """Return the name that a tensor of an old file has today."""
    for earlier, present in EARLIER_NAMES.items():
        if name.endswith(earlier):
            return name.removesuffix(earlier) + present
    return name


def _check(folder: Path, found: Mapping[str, StoredTensor], copies: Mapping[str, Iterable[Copy]]) -> None:
    faults = []
    for name, tensor in sorted(found.items()):
        shapes = {tuple(copy.target.shape) for copy in copies[name]}
        if {tensor.shape} != shapes:
            faults.append(f"{name} has the shape {list(tensor.shape)} instead of {list(next(iter(shapes)))}")
        if tensor.dtype not in FLOAT_DTYPES:
            faults.append(f"{name} is {tensor.dtype}, not {', '.join(FLOAT_DTYPES)}")
    if faults:
        raise WeightsError(f"{folder}: {listed(faults, last='and', most=5)}; use the folder of one complete model")


def _add_noise(tensor: Tensor, noise: float, seed: int) -> None:
    std = noise * float(torch.linalg.vector_norm(tensor)) / tensor.numel() ** 0.5
    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)), alpha=std)


def _draw_router(layer: MoeLayer, norm: nn.Module, upcycling: Upcycling) -> None:
    """Draw the weight of a router so that its logits have the wanted standard deviation.

    The router's inputs are gamma * n + beta, where n has the mean square 1: their mean squared length is about the sum
    of the squares of gamma and beta.
    """
    length = torch.stack([parameter.square().sum() for parameter in norm.parameters()]).sum().sqrt()
    generator = torch.Generator().manual_seed(derived_seed(upcycling.seed, f"{layer.name}.router"))
    weight_ED = cast(Tensor, layer.router.weight)
    weight_ED.copy_(torch.randn(weight_ED.shape, generator=generator) * (upcycling.router_std / float(length)))
