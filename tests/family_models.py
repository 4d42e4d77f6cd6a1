"""Small models of families whose records were made by program, and the same models converted."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dist_moe.comm.mesh import Mesh
from dist_moe.families.registry import family_of
from dist_moe.model.build import empty_model, family_rule, initialize, materialize
from tests.families.balanced import values_of
from tests.families.small import VOCABULARY, build, small_config

COVERING: Mapping[str, str] = {
    "mixtral": "names w1, w3, w2 in the files",
    "olmoe": "softmax, not normalized",
    "glm4_moe": "sigmoid with a bias of the router",
    "nemotron_h": "experts without a gate, Mamba layers",
    "hy_v4": "clamped experts",
    "granitemoe": "the router returns (ids, weights, logits); stacked in the files",
    "minimax_m2": "the block hands the bias to the router",
    "afmoe": "the logits are those of a child of the router",
    "gpt_oss": "experts with biases, transposed and interleaved; no SDPA",
    "ernie4_5_moe": "bias on probabilities, in a child of the router, with another name in the files",
    "gemma4": "router and experts in the decoder layer, with a scale",
    "qwen3_next": "recurrent layers, initialized by the block",
    "mistral4": "known to no auto class",
    "llama4": "gate weights on the input of experts, transposed; layers that attend to chunks",
    "openai_privacy_filter": "an encoder without a language model, whose router divides by the number of experts",
}
"""Families -> what each is the example of."""
ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)


class Pair(NamedTuple):
    """A model of transformers with random weights, and its configuration."""

    theirs: PreTrainedModel
    config: Any


def random_model(family: str, **changes: Any) -> Pair:
    """Build the small model with every parameter and bias away from its initial value."""
    config = small_config(family, **changes)
    torch.manual_seed(0)
    model = build(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return Pair(model, config)


def converted(config: Any, mesh: Mesh = ALONE) -> PreTrainedModel:
    """Build the converted model with initial values."""
    config = copy.deepcopy(config)
    model = empty_model(config, family_rule(config, family_of(config.model_type).score), mesh)
    materialize(model)
    initialize(model, seed=0)
    return model.eval()


@torch.no_grad()
def logits(model: Any, seed: int = 0) -> Tensor:
    """The logits of random tokens, or their last hidden states of an encoder."""
    tokens_BS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(seed))
    return values_of(model(input_ids=tokens_BS, use_cache=False))


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())
