"""The experts of one rank: a network of two layers each, computed together by grouped matrix products.

Shapes: Q rows, D model width (in `grouped_linear` any input width), H output width, F expert width, e local experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers torch.ops.transformers.grouped_mm_fallback)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from dist_moe.config.sections.model import KernelsName
from dist_moe.moe.kernels import kernels_for


class Part(NamedTuple):
    """A tensor of one expert, as weights folders have it: consecutive rows of a stacked parameter.

    Attributes:
        stacked: The parameter of all local experts.
        first: The first row within the expert.
        rows: The number of rows.
    """

    stacked: nn.Parameter
    first: int
    rows: int

    def view(self, expert: int) -> Tensor:
        """Return the tensor of a local expert, without graph."""
        return self.stacked.detach()[expert, self.first : self.first + self.rows]

    def start(self, expert: int) -> int:
        """Return the index of its first element in the flattened parameter."""
        row = self.stacked[0, 0].numel()
        return expert * self.stacked[0].numel() + self.first * row


class Experts(nn.Module, ABC):
    """The experts of one rank."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """The tensors of an expert, by their names in weights folders."""

    @abstractmethod
    def forward(self, rows_QD: Tensor, weights_Q: Tensor, ends_e: Tensor) -> Tensor:
        """Apply each expert to its rows, and multiply the results by the gate weights.

        Args:
            rows_QD: Sorted by local expert.
            weights_Q: The gate weight of each row.
            ends_e: int32, the index after each expert's last row; rows after the last one's belong to none.

        Returns:
            [Q, D] in the dtype of the rows.
        """


class GroupedExperts(Experts):
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

    @property
    def parts(self) -> Mapping[str, Part]:
        """The tensors of an expert, by their names in weights folders."""
        width = self.down_proj.shape[2]
        return {
            "gate_proj.weight": Part(self.gate_up_proj, 0, width),
            "up_proj.weight": Part(self.gate_up_proj, width, width),
            "down_proj.weight": Part(self.down_proj, 0, self.down_proj.shape[1]),
        }

    def forward(self, rows_QD: Tensor, weights_Q: Tensor, ends_e: Tensor) -> Tensor:
        """As `Experts.forward`; the weights are applied before the last projection, which is linear."""
        gate_up_QF = grouped_linear(rows_QD, self.gate_up_proj, ends_e)
        gated_QF = gate(gate_up_QF, weights_Q.to(rows_QD.dtype).unsqueeze(1), self.activation, self.kernels)
        return grouped_linear(gated_QF, self.down_proj, ends_e)


class BiasedExperts(Experts):
    """Networks down(act(up(x))), both layers with a bias, independent of other ranks.

    Args:
        experts: e, on this rank.
        width: D.
        expert_width: F.
        activation: act.

    Attributes:
        up_proj: [e, F, D].
        up_bias: [e, F].
        down_proj: [e, D, F].
        down_bias: [e, D].
    """

    def __init__(self, experts: int, width: int, expert_width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(experts, expert_width, width))
        self.up_bias = nn.Parameter(torch.empty(experts, expert_width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))
        self.down_bias = nn.Parameter(torch.empty(experts, width))
        self.activation = activation

    @property
    def parts(self) -> Mapping[str, Part]:
        """The tensors of an expert, by their names in weights folders."""
        names = {"up_proj.weight": self.up_proj, "up_proj.bias": self.up_bias}
        names |= {"down_proj.weight": self.down_proj, "down_proj.bias": self.down_bias}
        return {name: Part(stacked, 0, stacked.shape[1]) for name, stacked in names.items()}

    def forward(self, rows_QD: Tensor, weights_Q: Tensor, ends_e: Tensor) -> Tensor:
        """As `Experts.forward`."""
        weights_Q1 = weights_Q.to(rows_QD.dtype).unsqueeze(1)
        up_QF = grouped_bias(grouped_linear(rows_QD, self.up_proj, ends_e), self.up_bias, ends_e)
        down_QD = grouped_linear(self.activation(up_QF) * weights_Q1, self.down_proj, ends_e)
        return grouped_bias(down_QD, self.down_bias, ends_e, weights_Q1)


def grouped_bias(rows_QH: Tensor, bias_eH: Tensor, ends_e: Tensor, weights_Q1: Tensor | None = None) -> Tensor:
    """Add weights_Q1 * bias_eH[i], or the bias alone, to the rows of group i.

    Args:
        rows_QH: Sorted by group.
        bias_eH: A vector for each group.
        ends_e: int32, index after the last row of each group; the rows after the last one's are of no group.
        weights_Q1: The factors of the bias; None: 1.
    """
    found: Tensor = _GroupedBias.apply(rows_QH, bias_eH, ends_e, weights_Q1)
    return found


class _GroupedBias(torch.autograd.Function):
    """See `grouped_bias`. The gradient of a bias is a matrix product, whose sums have the same order in every run."""

    @staticmethod
    def forward(ctx: Any, rows_QH: Tensor, bias_eH: Tensor, ends_e: Tensor, weights_Q1: Tensor | None) -> Tensor:
        row_Q = torch.arange(len(rows_QH), dtype=ends_e.dtype, device=ends_e.device)
        group_Q = torch.bucketize(row_Q, ends_e, right=True)
        ctx.save_for_backward(bias_eH, group_Q, weights_Q1)
        added_QH = bias_eH.index_select(0, group_Q.clamp(max=len(bias_eH) - 1))
        return rows_QH + (added_QH if weights_Q1 is None else added_QH.mul_(weights_Q1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        bias_eH, group_Q, weights_Q1 = ctx.saved_tensors
        gradient_QH = gradients[0]
        bias_gradient_eH = weights_gradient_Q1 = None
        if ctx.needs_input_grad[1]:
            member_eQ = (group_Q == torch.arange(len(bias_eH), device=group_Q.device).unsqueeze(1)).to(
                gradient_QH.dtype
            )
            # Rows of no group may hold anything, and 0 * NaN is NaN.
            scaled_QH = gradient_QH if weights_Q1 is None else gradient_QH * weights_Q1
            bias_gradient_eH = member_eQ @ scaled_QH.masked_fill((group_Q == len(bias_eH)).unsqueeze(1), 0)
        if ctx.needs_input_grad[3]:
            added_QH = bias_eH.index_select(0, group_Q.clamp(max=len(bias_eH) - 1))
            wide = torch.promote_types(torch.float32, gradient_QH.dtype)
            weights_gradient_Q1 = (gradient_QH * added_QH).sum(dim=1, keepdim=True, dtype=wide).to(gradient_QH.dtype)
        return gradient_QH, bias_gradient_eH, None, weights_gradient_Q1


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
