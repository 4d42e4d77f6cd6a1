"""Small models of Hugging Face's MoE families, and a slow count of what their experts receive."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dist_moe.moe.router import Router
from dist_moe.probe.layers import find_layers
from dist_moe.probe.own_bias import find_own_bias

VOCABULARY, EXPERTS = 128, 8
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "sliding_window": 16},
    "granitemoe": {"num_local_experts": EXPERTS},
    "minimax_m2": {"num_local_experts": EXPERTS},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "num_hidden_layers": 3, "moe_layer_start_index": 1},
    "afmoe": {"num_experts": EXPERTS, "num_hidden_layers": 3, "num_dense_layers": 1, "sliding_window": 16},
    "jamba": {
        **{"num_experts": EXPERTS, "expert_layer_period": 1, "expert_layer_offset": 0, "num_hidden_layers": 2},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    },
    "llama4_text": {"num_local_experts": EXPERTS, "attention_chunk_size": 8, "no_rope_layers": [1, 0]},
    "deepseek_v3": LATENT,
    "deepseek_v2": LATENT,
}
"""Fields of a family besides `SIZES`."""


def make_model(family: str = "qwen3_moe", seed: int = 0, **changes: Any) -> nn.Module:
    """A small model in training mode, whose routers prefer some experts."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    for layer in find_layers(model):
        for parameter in layer.router.parameters():
            if parameter.ndim == 2 and parameter.shape[0] == EXPERTS:
                nn.init.normal_(parameter)
    return model.train()


def tokens(seed: int, rows: int = 2, length: int = 12) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def train_on(model: nn.Module, *batches: Tensor, **inputs: Any) -> None:
    """A forward and backward pass of each batch."""
    for batch in batches:
        model(input_ids=batch, labels=batch, **inputs).loss.backward()


class Received:
    """Counts what the experts modules of a model receive, by hooks of its own: each call, also of recomputation.

    Attributes:
        ids: Layer name -> the expert ids [T, K] of each call.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = find_layers(model)
        self.ids: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        for layer in layers:
            layer.experts.register_forward_pre_hook(self._keep(layer.name), with_kwargs=True)

    def take(self, mask: Tensor | None = None) -> list[list[int]]:
        """The assignments of each expert [L][E] in the calls since the last `take`.

        Args:
            mask: [B, S], 0 where a token is padding, of every call.
        """
        counts = [self._count(calls, mask) for calls in self.ids.values()]
        self.ids = {name: [] for name in self.ids}
        return counts

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [value for value in (*args, *kwargs.values()) if not value.is_floating_point()]
            (ids,) = given
            self.ids[name].append(ids.detach().clone())

        return keep

    @staticmethod
    def _count(calls: list[Tensor], mask: Tensor | None) -> list[int]:
        counts = [0] * EXPERTS
        for ids_TK in calls:
            kept = [True] * len(ids_TK) if mask is None else mask.flatten().tolist()
            for ids, is_token in zip(ids_TK.tolist(), kept, strict=True):
                for expert in ids if is_token else []:
                    counts[expert] += 1
        return counts


def added(*counts: list[list[int]]) -> list[list[int]]:
    """The sum of counts [L][E]."""
    return [[sum(each) for each in zip(*layer, strict=True)] for layer in zip(*counts, strict=True)]


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model by name, also those that are not saved."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def own_biases(model: nn.Module) -> list[Tensor]:
    """The tensors that the layers of a model read."""
    found = [find_own_bias(layer) for layer in find_layers(model)]
    return [getattr(own.owner, own.name) for own in found if own is not None]


def signs(counts: list[int]) -> Tensor:
    """Of mean - count, in exact integers."""
    differences = [sum(counts) - len(counts) * count for count in counts]
    return torch.tensor([float((each > 0) - (each < 0)) for each in differences])


def hooks_of(model: nn.Module) -> list[dict[int, Any]]:
    """The hooks of every module of a model."""
    return [value for module in model.modules() for key, value in vars(module).items() if key.endswith("_hooks")]


def logits_of(model: Any, seed: int = 0) -> Tensor:
    """In evaluation mode."""
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=tokens(seed)).logits
    return logits


def routers(model: nn.Module) -> list[Router]:
    """The routers of a routed model."""
    return [module for module in model.modules() if isinstance(module, Router)]
