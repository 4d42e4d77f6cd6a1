"""How many operators one MoE layer takes on a device, where some steps are one kernel each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.gather_sum import by_gather
from dist_moe.moe.kernels import Kernels
from dist_moe.moe.layer import ExpertParallelLayer
from dist_moe.moe.router import Router
from dist_moe.moe.row_order import number_rows, place_rows
from dist_moe.moe.select import Rule
from dist_moe.moe.swiglu import SwiGLU
from tests.dist.layers import on
from tests.host_reads import Operators

EXPERTS, WIDTH, TOKENS = 8, 32, 40
MOST_OPERATORS = 60
"""Of one layer, router included, forward and backward."""


class Layer(torch.nn.Module):
    """A router and experts, called as a Hugging Face block calls them."""

    def __init__(self, rule: Rule, dtype: torch.dtype, mesh: Mesh) -> None:
        super().__init__()
        local = GroupedExperts(len(mesh.local_experts(EXPERTS)), WIDTH, 16, F.silu)
        self.router = Router(EXPERTS, WIDTH, rule)
        self.experts = ExpertParallelLayer(local, EXPERTS, mesh)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.to(dtype)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        _, weights_TK, ids_TK = self.router(hidden_TD)
        mixed_TD: Tensor = self.experts(hidden_TD, ids_TK, weights_TK)
        return mixed_TD


class OneKernel:
    """Calls a function whose operators count as one, as a kernel of Triton does."""

    def __init__(self, operators: Operators, function: Callable[..., Any]) -> None:
        self.operators, self.function = operators, function

    def __call__(self, *args: Any) -> Any:
        before = len(self.operators.names)
        result = self.function(*args)
        self.operators.names[before:] = ["one kernel"]
        return result


def layer_operators(rank: int, world_size: int, rule: Rule) -> list[str]:
    """The operators of one forward and backward, with experts on all ranks of the joined world."""
    mesh = Mesh(world_size=1, rank=0, expert_parallel=1)
    if world_size > 1:
        mesh = make_mesh(world_size, shared_memory=False)
    layer = Layer(rule, torch.bfloat16, mesh)
    hidden_TD, probe_TD = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_(), torch.ones(TOKENS, WIDTH).bfloat16()
    operators = Operators()

    class FusedSwiGLU(SwiGLU):
        forward = staticmethod(OneKernel(operators, SwiGLU.forward))  # type: ignore[assignment]
        backward = staticmethod(OneKernel(operators, SwiGLU.backward))

    gather_sum, number, place = (OneKernel(operators, function) for function in (by_gather, number_rows, place_rows))
    with on(Kernels(gather_sum, FusedSwiGLU.apply, number, place)), operators:
        layer(hidden_TD).backward(probe_TD)
    return operators.names
