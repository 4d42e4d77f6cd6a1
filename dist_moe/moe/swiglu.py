"""The gate of an expert with the activation SiLU: silu(gate) * up, times the gate weight of the row.

Shapes: Q rows, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = 1 << 20
"""On a CPU the backward takes the rows in blocks of about this size, which stay in the cache between its operations."""

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
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_QF, weights_Q1 = ctx.saved_tensors
        gradient_QF, weights_gradient_Q1 = torch.empty_like(gate_up_QF), torch.empty_like(weights_Q1)
        tensors = (gradients[0], gate_up_QF, weights_Q1, gradient_QF, weights_gradient_Q1)
        for blocks in zip(*(tensor.split(_block_rows(gate_up_QF)) for tensor in tensors), strict=True):
            _write_gradients(*blocks)
        return gradient_QF, weights_gradient_Q1


def _block_rows(gate_up_QF: Tensor) -> int:
    """The rows of a block: on a CPU about `BLOCK_BYTES`, and on other devices all."""
    rows, width = gate_up_QF.shape
    if gate_up_QF.device.type == "cpu":
        rows = min(rows, BLOCK_BYTES // (width * gate_up_QF.itemsize))
    return max(1, rows)


def _write_gradients(
    gradient_QF: Tensor, gate_up_QF: Tensor, weights_Q1: Tensor, of_gate_up_QF: Tensor, of_weights_Q1: Tensor
) -> None:
    """Write the gradients of gate and up [Q, 2F] and of the weights [Q, 1] into the last two tensors."""
    gate_QF, up_QF = gate_up_QF.chunk(2, dim=-1)
    of_gate_QF, of_up_QF = of_gate_up_QF.chunk(2, dim=-1)
    torch.mul(gradient_QF, F.silu(gate_QF), out=of_up_QF)
    wide = torch.promote_types(torch.float32, gate_up_QF.dtype)
    of_weights_Q1.copy_((of_up_QF * up_QF).sum(dim=1, keepdim=True, dtype=wide))
    of_up_QF *= weights_Q1
    of_silu_QF = (gradient_QF * up_QF).mul_(weights_Q1)
    torch.ops.aten.silu_backward.grad_input(of_silu_QF, gate_QF, grad_input=of_gate_QF)
