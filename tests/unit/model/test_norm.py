"""RMSNorm as one function equals the classes of transformers, forward and backward, and replaces only those."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from dist_moe.model.norm import FusedRMSNorm, computes_rms_norm, fuse_norms
from tests.unit.model.samples import FAMILIES, small_model, tokens

WIDTH, EPSILON = 24, 1e-3


def run(norm: nn.Module, x_D: Tensor) -> list[Tensor]:
    """The output of a norm, and the gradients of its input and its weight for one fixed gradient."""
    leaf = x_D.detach().requires_grad_()
    found = norm(leaf)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(8)).to(found.dtype)
    return [found.detach(), *torch.autograd.grad(found, [leaf, *norm.parameters()], gradient)]


def pair(dtype: torch.dtype) -> tuple[nn.Module, FusedRMSNorm, Tensor]:
    """A norm of transformers, ours with the same weight, and an input with rows of very different size."""
    theirs = Qwen3MoeRMSNorm(WIDTH, eps=EPSILON)
    generator = torch.Generator().manual_seed(7)
    nn.init.normal_(theirs.weight, mean=1.0, generator=generator)
    theirs = theirs.to(dtype)
    x_BSD = torch.randn(3, 5, WIDTH, generator=generator) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
    return theirs, FusedRMSNorm(theirs.weight, EPSILON), x_BSD.to(dtype)


class WideNorm(nn.Module):
    """The slow twin, in fp64."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().double())

    def forward(self, x_D: Tensor) -> Tensor:
        return self.weight * x_D / (x_D.square().mean(-1, keepdim=True) + EPSILON).sqrt()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_trap_T72_one_function_equals_the_equation(dtype: torch.dtype, tolerance: float) -> None:
    _, ours, x_BSD = pair(dtype)
    for found, wanted in zip(run(ours, x_BSD), run(WideNorm(ours.weight), x_BSD.double()), strict=True):
        assert found.dtype == dtype and (found.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_that_of_transformers(dtype: torch.dtype) -> None:
    theirs, ours, x_BSD = pair(dtype)
    exact = run(WideNorm(ours.weight), x_BSD.double())
    for one, other, wanted in zip(run(ours, x_BSD), run(theirs, x_BSD), exact, strict=True):
        assert (one.double() - wanted).norm() < 1.5 * (other.double() - wanted).norm() + 1e-7 * wanted.norm()


class CenteredRMSNorm(Qwen3MoeRMSNorm):
    """A LayerNorm without a bias, under a name that does not say so."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class FarEpsilonRMSNorm(Qwen3MoeRMSNorm):
    """Adds its epsilon outside of the root."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + 1e-3)


@pytest.mark.parametrize(
    ("norm", "replaced"),
    [
        (Qwen3MoeRMSNorm(WIDTH, eps=1e-5), True),
        (DeepseekV3RMSNorm(WIDTH), True),
        (Gemma2RMSNorm(WIDTH), False),  # multiplies by 1 + weight
        (Llama4TextL2Norm(), False),  # has no weight
        (CenteredRMSNorm(WIDTH), False),
        (FarEpsilonRMSNorm(WIDTH), False),
        (nn.RMSNorm(WIDTH, eps=None), False),
        (nn.LayerNorm(WIDTH), False),
        (nn.Linear(WIDTH, 1, bias=False), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trap_T72_only_a_norm_that_computes_the_same_is_replaced(norm: nn.Module, replaced: bool) -> None:
    assert computes_rms_norm(norm) == replaced
    assert computes_rms_norm(copy.deepcopy(norm).to("meta")) == replaced


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_has_the_same_state_and_gradients(architecture: str) -> None:
    plain: Any = small_model(architecture, norm="plain")
    fused: Any = small_model(architecture)
    count = sum(type(module).__name__.endswith("RMSNorm") for module in plain.modules())
    assert sum(isinstance(module, FusedRMSNorm) for module in fused.modules()) == count > 6
    assert not any(isinstance(module, FusedRMSNorm) for module in plain.modules())
    assert fuse_norms(plain) == count and list(plain.state_dict()) == list(fused.state_dict())
    plain = small_model(architecture, norm="plain")
    results = []
    for model in (plain, fused):
        logits_BSV = model(input_ids=tokens(), use_cache=False).logits
        gradients = torch.autograd.grad(logits_BSV.float().square().mean(), list(model.parameters()), allow_unused=True)
        results.append([logits_BSV.detach(), *(g for g in gradients if g is not None)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7
