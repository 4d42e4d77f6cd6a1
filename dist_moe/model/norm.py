"""RMSNorm as one function, whose backward pass keeps the normalized values, in place of modules that compute the same.

The classes of transformers compute it in eight operations, each with a backward pass of its own over fp32 copies.
Shapes: D width of the norm; the other dimensions are any.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_moe.model import liger

EPSILONS = ("variance_epsilon", "eps")
"""What the classes of transformers call the term that keeps a row of zeros finite."""


class FusedRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon), with statistics in fp32 or better.

    The name ends as those of transformers do, whose initialization looks for it.

    Args:
        weight: [D], the parameter of the module that this one replaces.
        epsilon: Added to the mean of the squares.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = epsilon

    def forward(self, x_D: Tensor) -> Tensor:
        """Return the norm of x_D [..., D], in the dtype to which its own and that of the weight are promoted."""
        if x_D.is_cuda and not liger.missing():
            return liger.rms_norm(x_D, self.weight, self.variance_epsilon)
        return cast(Tensor, _RmsNorm.apply(x_D, self.weight, self.variance_epsilon))


class _RmsNorm(torch.autograd.Function):
    """See `FusedRMSNorm`. With n = x / rms: dx = (w dy - n mean(n w dy)) / rms, and dw = sum of n dy over the rows."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(torch.float32, x_D.dtype)
        wide_D = x_D.to(wide, copy=True)
        squares_1 = torch.linalg.vector_norm(wide_D, dim=-1, keepdim=True).square_()
        inverse_rms_1 = squares_1.div_(x_D.shape[-1]).add_(epsilon).rsqrt_()
        normed_D = wide_D.mul_(inverse_rms_1).to(x_D.dtype)
        ctx.save_for_backward(normed_D, inverse_rms_1, weight_D)
        return weight_D * normed_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed_D, inverse_rms_1, weight_D = ctx.saved_tensors
        wide = inverse_rms_1.dtype
        # One conversion of each: operations on tensors of two dtypes convert them again and again.
        gradient_D, normed_D, wide_weight_D = gradients[0].to(wide, copy=True), normed_D.to(wide), weight_D.to(wide)
        products_D = gradient_D * normed_D
        weight_gradient_D = products_D.flatten(0, -2).sum(0)
        mean_1 = (products_D @ wide_weight_D).div_(len(weight_D)).unsqueeze(-1)
        x_gradient_D = gradient_D.mul_(wide_weight_D).addcmul_(normed_D, mean_1, value=-1).mul_(inverse_rms_1)
        return x_gradient_D.to(gradients[0].dtype), weight_gradient_D.to(weight_D.dtype), None


def fuse_norms(model: nn.Module) -> int:
    """Replace the modules of a model that compute an RMSNorm, in place; parameters keep their names.

    Returns:
        The number of modules that were replaced.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if computes_rms_norm(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, FusedRMSNorm(cast(nn.Parameter, child.weight), _epsilon(child)))
    return len(found)


@torch.no_grad()
def computes_rms_norm(module: nn.Module) -> bool:
    """Whether a module, of any class, gives what `FusedRMSNorm` gives: tried on a copy with a weight other than 1.

    A norm of another kind, such as one that multiplies by 1 + weight, or subtracts the mean, gives other values.
    """
    named = dict(module.named_parameters())
    if list(named) != ["weight"] or named["weight"].ndim != 1 or any(True for _ in module.buffers()):
        return False
    if any(True for _ in module.children()) or not type(module).__name__.endswith("RMSNorm"):
        return False
    tried = copy.deepcopy(module).to_empty(device="cpu").float()
    width = len(named["weight"])
    cast(nn.Parameter, tried.weight).copy_(torch.linspace(0.5, 2.0, width))
    # Rows as small as the epsilon, and not of mean 0, show where it is added, and whether a mean is subtracted.
    x_D = torch.linspace(-1.0, 3.0, 3 * width).view(3, width) * torch.tensor([[1.0], [1e-3], [100.0]])
    try:
        found, wanted = tried(x_D), FusedRMSNorm(cast(nn.Parameter, tried.weight), _epsilon(module))(x_D)
        return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    except Exception:  # the class of another library may raise anything
        return False


def _epsilon(module: nn.Module) -> float:
    """The epsilon of a norm. Raises AttributeError where it has none of the known names."""
    return float(getattr(module, next((name for name in EPSILONS if hasattr(module, name)), EPSILONS[0])))
