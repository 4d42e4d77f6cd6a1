"""What a GPU runs for an MoE layer, on the CPU's tensors: equal results, and no host that waits for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.comm.mesh import Mesh
from dist_moe.model.routing import count_record
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.gather_sum import by_gather
from dist_moe.moe.kernels import ANY_DEVICE, CPU, Kernels
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.moe.select import Rule, ThresholdRouting, TopK
from dist_moe.moe.swiglu import SwiGLU
from tests.dist.layers import on
from tests.host_reads import HostReads, Operators

ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)
EXPERTS, WIDTH, TOKENS = 8, 32, 40
RULES: dict[str, Rule] = {
    "top-K": TopK(2, "sigmoid", normalize=True),
    "groups": TopK(2, "sigmoid", groups=4, topk_groups=2),
    "threshold": ThresholdRouting(0.5, 4),
}
MOST_OPERATORS = 60
"""Of one layer, router included, forward and backward."""


class Layer(torch.nn.Module):
    """A router and experts, called as a Hugging Face block calls them."""

    def __init__(self, rule: Rule, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = Router(EXPERTS, WIDTH, rule)
        self.experts = ExpertParallelLayer(GroupedExperts(EXPERTS, WIDTH, 16, F.silu), EXPERTS, ALONE)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.to(dtype)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        _, weights_TK, ids_TK = self.router(hidden_TD)
        mixed_TD: Tensor = self.experts(hidden_TD, ids_TK, weights_TK)
        return mixed_TD


def run(rule: Rule, dtype: torch.dtype, masked: bool) -> list[Tensor]:
    """One forward and backward -> the result, the load and all gradients."""
    layer = Layer(rule, dtype)
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    probe_TD = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    layer.router.open_record(torch.arange(TOKENS) % 3 > 0 if masked else None)
    mixed_TD = layer(hidden_TD)
    counts = count_record(layer.router, layer.router.close_record(), needs_margins=True)
    mixed_TD.backward(probe_TD)
    gradients = [leaf.grad for leaf in (hidden_TD, *layer.parameters()) if leaf.grad is not None]
    assert len(gradients) == 4
    return [mixed_TD.detach(), *(count for count in counts if count is not None), *gradients]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_device_computes_what_the_cpu_does(rule: str, masked: bool, dtype: torch.dtype) -> None:
    with on(CPU):
        wanted = run(RULES[rule], dtype, masked)
    with on(ANY_DEVICE):
        found = run(RULES[rule], dtype, masked)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_trap_T52_on_a_device_the_host_waits_for_nothing(rule: str, masked: bool) -> None:
    with on(ANY_DEVICE), HostReads() as reads, Operators() as operators:
        run(RULES[rule], torch.float32, masked)
    assert reads.names == [] and operators.waiting == []


class OneKernel:
    """Calls a function whose operators count as one, as a kernel of Triton does."""

    def __init__(self, operators: Operators, function: Callable[..., Any]) -> None:
        self.operators, self.function = operators, function

    def __call__(self, *args: Any) -> Any:
        before = len(self.operators.names)
        result = self.function(*args)
        self.operators.names[before:] = ["one kernel"]
        return result


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_takes_few_operators(rule: str) -> None:
    layer = Layer(RULES[rule], torch.bfloat16)
    hidden_TD, probe_TD = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_(), torch.ones(TOKENS, WIDTH).bfloat16()
    operators = Operators()

    class FusedSwiGLU(SwiGLU):
        forward = staticmethod(OneKernel(operators, SwiGLU.forward))  # type: ignore[assignment]
        backward = staticmethod(OneKernel(operators, SwiGLU.backward))  # type: ignore[assignment]

    with on(Kernels(OneKernel(operators, by_gather), FusedSwiGLU.apply)), operators:
        layer(hidden_TD).backward(probe_TD)
    assert len(operators.names) <= MOST_OPERATORS, operators.names
