"""The implementations of an MoE block, and the bare grouped matmuls that none of them can be faster than.

Shapes: T tokens, D hidden width, F expert width, E experts, R assignments.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import BlockCase
from benchmarks.step.setting import LEARNING_RATE
from dist_moe.comm.mesh import Mesh
from dist_moe.model.build import build_model
from dist_moe.moe.select import Rule, ThresholdRouting
from dist_moe.worker.network import free_port

TARGET_EXPERTS = 2.0
"""Experts per token of threshold routing, on average."""
CONSTANT = 0
"""The index of the feature that is 1 in every token, whose weights in the router skew the load."""


class Block(NamedTuple):
    """One implementation.

    Attributes:
        module: [1, T, D] -> [1, T, D], alone or first in a tuple.
        router_weight_ED: The weight of its router.
    """

    module: nn.Module
    router_weight_ED: Tensor


def hf_config(case: BlockCase) -> dict[str, Any]:
    """Return the keyword arguments of a Qwen3-MoE config with one layer."""
    return {
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden,
        "moe_intermediate_size": case.width,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": case.experts,
        "num_experts_per_tok": case.top_k,
        "norm_topk_prob": True,
        "vocab_size": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def of_hugging_face(case: BlockCase, implementation: str) -> nn.Module:
    """Return the model with one layer of transformers, with `experts_implementation`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3_moe", **hf_config(case))
    model: nn.Module = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation=implementation
    )
    return model


def ours(case: BlockCase, rule: Rule | str = "softmax") -> Block:
    """Return the block of this package."""
    model = build_model("qwen3_moe", hf_config(case), rule, Mesh(1, 0, 1), seed=0)  # type: ignore[arg-type]
    block = model.model.layers[0].mlp
    return Block(block, block.gate.weight)


def ours_threshold(case: BlockCase) -> Block:
    """Return the block of this package with threshold routing at TARGET_EXPERTS per token."""
    weight_ED = ours(case).router_weight_ED.detach()
    threshold = threshold_for(F.linear(tokens(case, seed=0), weight_ED), TARGET_EXPERTS)
    return ours(case, ThresholdRouting(threshold, max_experts=case.experts, normalize=True))


def hf(case: BlockCase) -> Block:
    """Return the block of transformers with grouped matmuls."""
    block: Any = of_hugging_face(case, "grouped_mm").get_submodule("model.layers.0.mlp")
    return Block(block, block.gate.weight)


def loop(case: BlockCase) -> Block:
    """Return the block of transformers with a loop over the experts."""
    block: Any = of_hugging_face(case, "eager").get_submodule("model.layers.0.mlp")
    return Block(block, block.gate.weight)


def autoep(case: BlockCase) -> Block:
    """Return the block that DeepSpeed AutoEP puts into a model in an engine of one rank."""
    deepspeed = start_deepspeed()
    model = of_hugging_face(case, "grouped_mm")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "steps_per_print": 2**31,
        "expert_parallel": {"enabled": True, "autoep_size": 1, "preset_model": "qwen3_moe"},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    block = engine.module.get_submodule("model.layers.0.mlp")
    # The engine's own hooks would reduce gradients and count micro-batches.
    engine.destroy()
    return Block(block, block.router.gate.weight)


def classic(case: BlockCase) -> Block:
    """Return DeepSpeed's MoE layer, which drops the tokens over the capacity."""
    start_deepspeed()
    from deepspeed.moe.layer import MoE

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Linear(case.hidden, 2 * case.width, bias=False)
            self.down = nn.Linear(case.width, case.hidden, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            out: Tensor = self.down(F.silu(gate) * up)
            return out

    layer = MoE(case.hidden, Expert(), num_experts=case.experts, k=case.top_k, min_capacity=0)
    layer.set_deepspeed_parallelism()
    return Block(layer, layer.deepspeed_moe.gate.wg.weight)


def start_deepspeed() -> Any:
    """Import DeepSpeed, and make a process group of this process alone."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo")
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


BLOCKS: dict[str, Callable[[BlockCase], Block]] = {
    "ours": ours,
    "ours-threshold": ours_threshold,
    "autoep": autoep,
    "hf": hf,
    "loop": loop,
    "classic": classic,
}


def skew(block: Block, exponent: float) -> None:
    """Make the load follow Zipf's law: add -exponent * ln(e + 1) to the logit of expert e of every token."""
    experts = len(block.router_weight_ED)
    with torch.no_grad():
        block.router_weight_ED[:, CONSTANT] = -exponent * torch.arange(1, experts + 1).float().log()


def tokens(case: BlockCase, seed: int) -> Tensor:
    """Return hidden states [T, D] in fp32, of unit variance, and 1 in the feature CONSTANT."""
    hidden_TD = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(seed))
    hidden_TD[:, CONSTANT] = 1.0
    return hidden_TD


def expert_loads(case: BlockCase, weight_ED: Tensor, hidden_TD: Tensor) -> Tensor:
    """Return the assignments of each expert, int64 [E], by top-K over the logits of a router."""
    ids_TK = F.linear(hidden_TD, weight_ED.float()).topk(case.top_k, dim=-1).indices
    return torch.bincount(ids_TK.flatten(), minlength=case.experts)


def threshold_for(logits_TE: Tensor, target: float) -> float:
    """Return the threshold with which a token takes `target` experts on average, by bisection."""
    sorted_TE = logits_TE.softmax(dim=-1).sort(dim=-1, descending=True).values
    before_TE = sorted_TE.cumsum(dim=-1) - sorted_TE
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float((before_TE < middle).sum()) < target * len(logits_TE) else (low, middle)
    return high


class Limit:
    """The six grouped matmuls of forward and backward with the group sizes of one routing, and nothing around them.

    The sizes stay the same in all rounds, so that oneDNN, which compiles a kernel for each new size of a bf16 matmul,
    has all of them.

    Args:
        case: The sizes.
        load_E: int64, the rows of each expert.
        dtype: Of all tensors.
    """

    def __init__(self, case: BlockCase, load_E: Tensor, dtype: torch.dtype) -> None:
        rows = int(load_E.sum())

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype)

        self._ends_E = load_E.cumsum(0).to(torch.int32)
        self._rows_RD, self._gate_up_RG = random(rows, case.hidden), random(rows, 2 * case.width)
        self._inner_RF = random(rows, case.width)
        self._gate_up_EFD = random(case.experts, 2 * case.width, case.hidden)
        self._down_EDF = random(case.experts, case.hidden, case.width)

    def __call__(self) -> None:
        """Run the six matmuls."""
        ends, rows, inner = self._ends_E, self._rows_RD, self._inner_RF
        F.grouped_mm(rows, self._gate_up_EFD.transpose(-2, -1), offs=ends)
        F.grouped_mm(inner, self._down_EDF.transpose(-2, -1), offs=ends)
        F.grouped_mm(rows, self._down_EDF, offs=ends)
        F.grouped_mm(rows.t(), inner, offs=ends)
        F.grouped_mm(self._gate_up_RG, self._gate_up_EFD, offs=ends)
        F.grouped_mm(self._gate_up_RG.t(), rows, offs=ends)
