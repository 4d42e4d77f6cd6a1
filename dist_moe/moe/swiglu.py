"""The gate of an expert with the activation SiLU: silu(gate) * up, times the gate weight of the row.

Shapes: Q rows, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Gate = Callable[[Tensor, Tensor], Tensor]
"""(gate_up_QF [Q, 2F] with gate before up, weights_Q1 [Q, 1]) -> [Q, F], differentiable."""


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight, of which only the inputs are kept; one tensor holds the gradients of gate and up."""

    @staticmethod
    def forward(ctx: Any, gate_up_QF: Tensor, weights_Q1: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_QF, weights_Q1)
        gate_QF, up_QF = gate_up_QF.chunk(2, dim=-1)
        return F.silu(gate_QF).mul_(up_QF).mul_(weights_Q1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_QF, weights_Q1 = ctx.saved_tensors
        gate_QF, up_QF = gate_up_QF.chunk(2, dim=-1)
        gradient_QF = torch.empty_like(gate_up_QF)
        of_gate_QF, of_up_QF = gradient_QF.chunk(2, dim=-1)
        torch.mul(gradients[0], F.silu(gate_QF), out=of_up_QF)
        wide = torch.promote_types(torch.float32, gate_up_QF.dtype)
        weights_gradient_Q1 = (of_up_QF * up_QF).sum(dim=1, keepdim=True, dtype=wide)
        of_up_QF *= weights_Q1
        of_silu_QF = (gradients[0] * up_QF).mul_(weights_Q1)
        torch.ops.aten.silu_backward.grad_input(of_silu_QF, gate_QF, grad_input=of_gate_QF)
        return gradient_QF, weights_gradient_Q1.to(weights_Q1.dtype)
