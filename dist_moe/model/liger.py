"""Kernels of Liger for a GPU, where they can run (the extra `gpu`): the only module that imports it.

Shapes: T rows (tokens), D model width.
"""

import functools
import importlib.util
from typing import cast

import torch
from torch import Tensor, nn

from dist_moe.data.stream import IGNORE_INDEX
from dist_moe.moe.kernels import missing_for_triton


@functools.cache
def missing() -> str:
    """Return what these kernels, which are of Triton, need and this machine does not have; "" if nothing."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel, which is not installed"
    return missing_for_triton()


def linear_nll_sum(hidden_TD: Tensor, head: nn.Linear, targets_T: Tensor) -> Tensor:
    """Return the sum of -ln p over the targets other than -100, fp32, by a kernel that passes over the logits once.

    It counts the labels on the host, and so waits for the device once in a forward.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(
        hidden_TD,
        head.weight,
        targets_T,
        head.bias,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        accum_dtype=torch.float32,
    )
    return cast(Tensor, loss).float()


def rms_norm(x_D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Return the norm of x_D [..., D] as the classes of transformers compute it."""
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: the gradient that it would overwrite may also be that of a residual.
    return cast(Tensor, liger_rms_norm(x_D, weight_D, epsilon, in_place=False))
