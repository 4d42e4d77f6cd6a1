"""Small dense models of every architecture that can be upcycled, and their folders."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from dist_moe.checkpoint.format.dense_folder import Upcycling, fill_upcycled
from dist_moe.comm.mesh import Mesh
from dist_moe.families.dense import DENSE
from dist_moe.model.build import empty_model, initialize, materialize
from dist_moe.moe.select import Rule, TopK
from tests.dist.small import VOCABULARY

EXPERTS = 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
DECODER = {**SHAPE, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    architecture: {**(SHAPE if family.encoder else DECODER), **({"head_dim": 8} if architecture == "qwen3" else {})}
    for architecture, family in DENSE.items()
}
TOP_2 = TopK(2, "softmax")
EXACT = Upcycling(noise=0.0, router_std=1.7, seed=0)


def dense_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """The small model as transformers makes it, every parameter moved from its initial value."""
    torch.manual_seed(4)
    cls = AutoModel if DENSE[architecture].encoder else AutoModelForCausalLM
    model: PreTrainedModel = cls.from_config(AutoConfig.for_model(architecture, **{**SHAPES[architecture], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def dense_folder(folder: Path, architecture: str, **changes: Any) -> PreTrainedModel:
    """Write the folder of a small dense model, in several files -> the model."""
    model = dense_model(architecture, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size="60KB")
    return model


def upcycled(
    folder: Path,
    architecture: str,
    mesh: Mesh,
    rule: Rule = TOP_2,
    upcycling: Upcycling = EXACT,
    layers: tuple[int, ...] = (1, 3),
    **changes: Any,
) -> PreTrainedModel:
    """The MoE model of a dense folder, in evaluation mode."""
    added = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_layers": list(layers)}
    config = AutoConfig.for_model(architecture, **{**SHAPES[architecture], **changes, **added})
    model = empty_model(config, rule, mesh)
    materialize(model)
    initialize(model, seed=0)
    fill_upcycled(model, mesh, folder, upcycling)
    return model.eval()


@torch.no_grad()
def outputs(model: Any, tokens_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """The logits of a decoder, or the last hidden states of an encoder."""
    found = model(input_ids=tokens_BS, attention_mask=mask_BS)
    result: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return result
