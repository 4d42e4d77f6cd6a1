"""Small models of both families, a packed batch, and what a weights folder holds: what these tests share."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.model import NormName
from dist_moe.model.build import build_model
from dist_moe.scores import Score
from tests.dist.small import DEEPSEEK, VOCABULARY

ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)
QWEN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[dict[str, Any], Score]] = {
    "deepseek_v3": (DEEPSEEK, "sigmoid"),
    "qwen3_moe": (QWEN, "softmax"),
}


def small_model(
    architecture: str, mesh: Mesh = ALONE, score: Score | None = None, norm: NormName = "auto", **changes: Any
) -> PreTrainedModel:
    """The family's small model with the initial values of seed 0; `changes` are keys of its config class."""
    settings, own_score = FAMILIES[architecture]
    return build_model(architecture, settings | changes, score or own_score, mesh, seed=0, norm=norm)


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Move every parameter, so that none (a norm's weight of 1, say) is what any other model starts with."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    """Token ids [rows, length], without the end token."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any, tokens_BS: Tensor) -> Tensor:
    """Logits of a model in evaluation mode, ours or that of transformers."""
    found: Tensor = model.eval()(input_ids=tokens_BS).logits
    return found


def stored_tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Name of each tensor in a weights folder -> its shape and dtype."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated over)
                found[name] = (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype())
    return found
