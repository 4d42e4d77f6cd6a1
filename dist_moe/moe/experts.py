"""The experts of one rank: a gated two-layer network each, computed together by grouped matrix products.

Shapes: Q rows, D model width (in `grouped_linear` any input width), H output width, F expert width, e local experts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers torch.ops.transformers.grouped_mm_fallback)
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from dist_moe.config.sections.model import KernelsName
from dist_moe.moe.kernels import kernels_for


class GroupedExperts(nn.Module):
    """Gated networks down(act(gate(x)) * up(x)) without bias, independent of other ranks.

    Args:
        experts: e, on this rank.
        width: D.
        expert_width: F.
        activation: act.
        kernels: The implementations on a GPU, as `model.moe_kernels` names them.

    Attributes:
        gate_up_proj: [e, 2F, D], gate above up, as Hugging Face stores it.
        down_proj: [e, D, F].
    """

    def __init__(
        self,
        experts: int,
        width: int,
        expert_width: int,
        activation: Callable[[Tensor], Tensor],
        kernels: KernelsName = "auto",
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))
        self.activation = activation
        self.kernels = kernels

    def forward(self, rows_QD: Tensor, weights_Q: Tensor, ends_e: Tensor) -> Tensor:
        """Apply each expert to its rows, and multiply the results by the gate weights.

        The weights are applied before the last projection, which is linear.

        Args:
            rows_QD: Sorted by local expert.
            weights_Q: The gate weight of each row.
            ends_e: int32, the index after each expert's last row; rows after the last one's belong to none.

        Returns:
            [Q, D] in the dtype of the rows.
        """
        gate_up_QF = grouped_linear(rows_QD, self.gate_up_proj, ends_e)
        gated_QF = gate(gate_up_QF, weights_Q.to(rows_QD.dtype).unsqueeze(1), self.activation, self.kernels)
        return grouped_linear(gated_QF, self.down_proj, ends_e)


def gate(
    gate_up_QF: Tensor,
    weights_Q1: Tensor,
    activation: Callable[[Tensor], Tensor],
    kernels: KernelsName = "auto",
) -> Tensor:
    """Return activation(gate) * up * weights.

    Args:
        gate_up_QF: [Q, 2F], gate before up.
        weights_Q1: [Q, 1].
        activation: Any; SiLU, which makes this SwiGLU, is computed in fewer passes.
        kernels: The implementation on a GPU, as `model.moe_kernels` names it.

    Returns:
        [Q, F].
    """
    if is_silu(activation):
        return kernels_for(gate_up_QF.device, kernels).swiglu(gate_up_QF, weights_Q1)
    gate_QF, up_QF = gate_up_QF.chunk(2, dim=-1)
    return activation(gate_QF) * up_QF * weights_Q1


def is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    """Return whether an activation is SiLU, as a function of torch, or a module of torch or transformers."""
    return activation is F.silu or isinstance(activation, nn.SiLU | SiLUActivation)


def grouped_linear(rows_QD: Tensor, weight_eHD: Tensor, ends_e: Tensor) -> Tensor:
    """Multiply the rows of group i by weight_eHD[i] transposed.

    Uses `torch.nn.functional.grouped_mm` where the dtype and the widths (multiples of 16 bytes) allow it, and
    the loop of the transformers library otherwise (fp64 in tests, odd widths).

    Args:
        rows_QD: Sorted by group.
        weight_eHD: A matrix for each group.
        ends_e: int32, index after the last row of each group.

    Returns:
        [Q, H].
    """
    # A loop over slices of the parameter would be slower: the backward of each slice fills a gradient of the whole
    # parameter (64 experts of 1024 x 1024 on one core: 28 times the time of grouped_mm).
    weight_eDH = weight_eHD.transpose(-2, -1)
    if _fits_grouped_mm(rows_QD, weight_eHD):
        return _ContiguousGradient.apply(F.grouped_mm(rows_QD, weight_eDH, offs=ends_e))
    return torch.ops.transformers.grouped_mm_fallback(rows_QD, weight_eDH, ends_e)


def _fits_grouped_mm(rows_QD: Tensor, weight_eHD: Tensor) -> bool:
    narrow = rows_QD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if rows_QD.is_cuda:  # the CUDA kernel supports bf16 only
        narrow = rows_QD.dtype == torch.bfloat16
    itemsize = rows_QD.element_size()
    return narrow and all(size * itemsize % 16 == 0 for size in weight_eHD.shape[1:])


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is made contiguous: the backward of grouped_mm refuses an expanded one (stride 0)."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        gradient = gradients[0]
        # An empty tensor counts as contiguous with any strides.
        return gradient.contiguous() if gradient.numel() else gradient.new_empty(gradient.shape)
