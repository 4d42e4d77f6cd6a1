"""Functions with a backward of their own: a second derivative is refused, not wrong. That of Triton leaves fp64."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.moe.router import _WideLinear
from dist_moe.moe.select import _Normalize
from dist_moe.moe.swiglu import SwiGLU

TRITON_KERNELS = "dist_moe.moe.triton_kernels"


@pytest.fixture
def triton_swiglu(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The class of `triton_kernels`; where Triton is not installed, with a stand-in, whose kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
        vars(triton).update(jit=lambda kernel: kernel, language=language)
        vars(language).update(constexpr=int)
        # Set and deleted at once, so that nothing is left after the test.
        for name in ("triton", TRITON_KERNELS):
            monkeypatch.setitem(sys.modules, name, triton)
        monkeypatch.setitem(sys.modules, "triton.language", language)
        monkeypatch.delitem(sys.modules, TRITON_KERNELS)
    module: Any = importlib.import_module(TRITON_KERNELS)
    return module.SwiGLU


def leaves(*shapes: tuple[int, int]) -> list[Tensor]:
    """Random values above 0, fp64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def second_derivative(apply: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    first = torch.autograd.grad(apply(*inputs).square().sum(), inputs, create_graph=True)
    first[0].square().sum().backward()


@pytest.mark.parametrize(
    ("function", "shapes"),
    [(_Normalize, [(5, 3)]), (SwiGLU, [(5, 8), (5, 1)]), (_WideLinear, [(5, 4), (3, 4)])],
    ids=["normalize", "swiglu", "router"],
)
def test_a_second_derivative_is_refused(function: type[Any], shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second_derivative(function.apply, leaves(*shapes))


def test_a_second_derivative_of_the_kernel_of_triton_is_refused(triton_swiglu: type[Any]) -> None:
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second_derivative(triton_swiglu.apply, leaves((5, 8), (5, 1)))


def test_triton_leaves_fp64_to_torch(triton_swiglu: type[Any]) -> None:
    assert torch.autograd.gradcheck(triton_swiglu.apply, leaves((5, 8), (5, 1)))
