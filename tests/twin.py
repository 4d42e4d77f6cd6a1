"""The slow twins of selection and of an MoE layer: token by token, on one process with all experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.moe.select import BiasInputs, ThresholdRouting, TopK


def slow_gate(logits_E: Tensor, score: str) -> Tensor:
    """The gate function of one token."""
    if score == "sigmoid":
        return 1 / (1 + torch.exp(-logits_E))
    if score == "sqrt_softplus":
        return torch.sqrt(torch.log1p(torch.exp(logits_E)))
    return torch.exp(logits_E) / torch.exp(logits_E).sum()


def slow_select(logits_E: Tensor, rule: TopK, inputs: BiasInputs) -> tuple[list[int], Tensor]:
    """The experts of one token, best first, and their weights with the graph to the logits."""
    shifted_E = logits_E if inputs.logit_bias_E is None else logits_E + inputs.logit_bias_E
    choice = slow_gate(shifted_E, rule.score).tolist()
    if inputs.log_weight_E is not None:
        choice = [value * math.exp(bias) for value, bias in zip(choice, inputs.log_weight_E.tolist(), strict=True)]
    if inputs.score_bias_E is not None:
        choice = [value + bias for value, bias in zip(choice, inputs.score_bias_E.tolist(), strict=True)]
    size = len(choice) // rule.groups
    groups = [range(first, first + size) for first in range(0, len(choice), size)]
    groups.sort(key=lambda group: -sum(sorted(choice[expert] for expert in group)[-2:]))
    candidates = [expert for group in groups[: rule.topk_groups] for expert in group]
    ids = sorted(candidates, key=lambda expert: -choice[expert])[: rule.top_k]
    weighing_E = shifted_E if rule.bias_in_gate_weights else logits_E
    weights_K = slow_gate(weighing_E[ids] if rule.score == "softmax_selected" else weighing_E, rule.score)
    if rule.score != "softmax_selected":
        weights_K = weights_K[ids]
    if rule.normalize:
        weights_K = weights_K / weights_K.sum()
    return ids, weights_K * rule.routed_scaling_factor


def slow_select_by_threshold(
    logits_E: Tensor, rule: ThresholdRouting, threshold: float, logit_bias_E: Tensor | None
) -> tuple[list[int], Tensor]:
    """The experts of one token, most probable first, taken until they reach the threshold; and their weights."""
    biased_E = logits_E if logit_bias_E is None else logits_E + logit_bias_E
    choice = slow_gate(biased_E, "softmax").tolist()
    ids: list[int] = []
    reached = 0.0
    for expert in sorted(range(len(choice)), key=lambda expert: -choice[expert]):
        if ids and (reached >= threshold or len(ids) == rule.max_experts):
            break
        ids.append(expert)
        reached += choice[expert]
    weights_K = slow_gate(biased_E if rule.bias_in_gate_weights else logits_E, "softmax")[ids]
    if rule.normalize:
        weights_K = weights_K / weights_K.sum()
    return ids, weights_K * rule.routed_scaling_factor


def slow_experts(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Each token's sum of weight times down(silu(gate(x)) * up(x)) over its experts; an id of -1 adds nothing."""
    results = []
    for hidden_D, ids, weights_K in zip(hidden_TD, ids_TK.tolist(), weights_TK, strict=True):
        total_D = torch.zeros_like(hidden_D)
        for expert, weight in zip(ids, weights_K, strict=True):
            if expert >= 0:
                gate_F, up_F = (gate_up_EHD[expert] @ hidden_D).chunk(2)
                total_D = total_D + weight * (down_EDF[expert] @ (F.silu(gate_F) * up_F))
        results.append(total_D)
    return torch.stack(results) if results else torch.zeros_like(hidden_TD)


@dataclass(frozen=True)
class LayerCase:
    """Tokens, experts and ranks for one forward and backward of a layer.

    tokens: of each rank. top_k: slots of a token. used_experts: experts that tokens may take, at least top_k of them;
    None is all. padding: share of the tokens without experts. zipf_exponent: how uneven the load is (0: even).
    ragged: tokens take 1 to top_k experts, as with threshold routing. ranks_per_node: as for `make_mesh`.
    on_device: with the implementations for other devices than the CPU. shared_memory: as for `make_mesh`. In bf16 all
    values are above 0, so that no sum cancels, and each row of each result is right to a few roundings.
    """

    expert_parallel: int
    tokens: tuple[int, ...]
    experts: int
    top_k: int
    used_experts: tuple[int, ...] | None = None
    padding: float = 0.0
    zipf_exponent: float = 0.0
    ragged: bool = False
    width: int = 8
    expert_width: int = 4
    dtype: torch.dtype = torch.float64
    seed: int = 0
    ranks_per_node: int = 0
    on_device: bool = False
    shared_memory: bool = True

    def draw(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden_TD, ids_TK, weights_TK and the probe_TD whose inner product with the result is the loss."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        tokens = self.tokens[rank]
        used_experts = torch.tensor(self.used_experts or range(self.experts))
        popularity = torch.exp(self.zipf_exponent * torch.linspace(-1, 1, len(used_experts))).expand(tokens, -1)
        ids_TK = torch.zeros(0, self.top_k, dtype=torch.int64)
        if tokens:
            ids_TK = used_experts[torch.multinomial(popularity, self.top_k, generator=generator)]
        ids_TK[torch.rand(tokens, generator=generator) < self.padding] = -1
        if self.ragged:
            taken_T1 = torch.randint(1, self.top_k + 1, (tokens, 1), generator=generator)
            ids_TK[torch.arange(self.top_k) >= taken_T1] = -1
        floats = self._randn((tokens, 2 * self.width + self.top_k), generator)
        hidden_TD, probe_TD, weights_TK = floats.split([self.width, self.width, self.top_k], dim=1)
        return hidden_TD.to(self.dtype), ids_TK, weights_TK.to(self.dtype), probe_TD.to(self.dtype)

    def draw_experts(self) -> tuple[Tensor, Tensor]:
        """gate_up_EHD and down_EDF of all experts."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.experts, 3 * self.expert_width, self.width)
        values = self._randn(shape, generator) / self.width**0.5
        gate_up_EHD, down_EFD = values.split([2 * self.expert_width, self.expert_width], dim=1)
        return gate_up_EHD.to(self.dtype), down_EFD.transpose(1, 2).contiguous().to(self.dtype)

    def _randn(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.abs() if self.dtype == torch.bfloat16 else values


@dataclass(frozen=True)
class Pass:
    """The results of a forward and backward on a rank; the experts' gradients are of the experts in `held`."""

    mixed_TD: Tensor
    hidden_gradient_TD: Tensor
    weights_gradient_TK: Tensor
    held: range
    gate_up_gradient: Tensor
    down_gradient: Tensor


def slow_pass(case: LayerCase, ranks: Sequence[int]) -> Pass:
    """The twin over the tokens of `ranks`, one after the other, with all experts; in fp32 where the case is in bf16."""
    draws = [case.draw(rank) for rank in ranks]
    hidden_TD, ids_TK, weights_TK, probe_TD = (torch.cat(parts) for parts in zip(*draws, strict=True))
    wide = torch.promote_types(torch.float32, case.dtype)
    leaves = [leaf.to(wide).requires_grad_() for leaf in (hidden_TD, weights_TK, *case.draw_experts())]
    hidden_TD, weights_TK = leaves[:2]
    mixed_TD = slow_experts(hidden_TD, ids_TK, weights_TK, leaves[2], leaves[3])
    if mixed_TD.requires_grad:  # no token took an expert otherwise
        (mixed_TD * probe_TD).sum().backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return Pass(mixed_TD.detach(), gradients[0], gradients[1], range(case.experts), gradients[2], gradients[3])
