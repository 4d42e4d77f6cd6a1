"""The experts of a rank for families whose experts are not SwiGLU networks without biases.

Shapes: Q rows, D model width, F expert width, e local experts, H output width of a layer.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from dist_moe.moe.experts import Experts, Part, grouped_bias, grouped_linear
from dist_moe.probe.weighted_inputs import InputWeightedExperts

UP, GATE_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"
KNOWN = {name + suffix for name in (UP, GATE_UP, DOWN) for suffix in ("", "_bias")}
SMALL_WIDTH, SMALL_EXPERT_WIDTH, SMALL_TOKENS = 16, 8, 32
"""Of the experts that `check_experts` compares."""
TOLERANCE = 1e-4


class FamilyExperts(Experts):
    """Networks of two layers as a family's own experts compute them, independent of other ranks.

    The activation, the clamps and the order of gate and up are those of the family's own module: its method
    `_apply_gate`, or that of transformers where it has none, or `act_fn` without a gate.

    Args:
        original: The family's module, with the weights of all experts, stacked.
        experts: e, on this rank.

    Attributes:
        gate_up_proj: [e, 2F, D], or `up_proj` [e, F, D] without a gate; transposed where the family has it so.
        down_proj: [e, D, F], or transposed.
        weighs_inputs: Whether the gate weights are factors of the input, as of `InputWeightedExperts`.

    Raises:
        ValueError: The module has other weights.
    """

    def __init__(self, original: nn.Module, experts: int) -> None:
        super().__init__()
        parameters = dict(original.named_parameters())
        if unknown := sorted({*parameters, *dict(original.named_buffers())} - KNOWN):
            raise ValueError(f"its experts ({type(original).__name__}) have {', '.join(unknown)}, which is not known")
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(experts, *parameter.shape[1:])))
        self.is_gated = GATE_UP in parameters
        self.is_transposed = _is_transposed(original)
        self.weighs_inputs = isinstance(original, InputWeightedExperts)
        # A copy without weights, out of the list of children: it is called for its activation alone.
        activation: Any = copy.copy(original)
        activation._parameters = {}
        self._activation: list[Any] = [activation]

    @property
    def parts(self) -> Mapping[str, Part]:
        """The tensors of an expert, by their names in weights folders: those of the family's module."""
        return {name: Part(stacked, 0, stacked.shape[1]) for name, stacked in self.named_parameters()}

    def forward(self, rows_QD: Tensor, weights_Q: Tensor, ends_e: Tensor) -> Tensor:
        """As `Experts.forward`."""
        weights_Q1 = weights_Q.to(rows_QD.dtype).unsqueeze(1)
        if self.weighs_inputs:
            rows_QD = rows_QD * weights_Q1
        up_QF = self._apply_linear(rows_QD, GATE_UP if self.is_gated else UP, ends_e)
        hidden_QF = self._activate(up_QF)
        if self.weighs_inputs:
            return self._apply_linear(hidden_QF, DOWN, ends_e)
        return self._apply_linear(hidden_QF * weights_Q1, DOWN, ends_e, weights_Q1)

    def _activate(self, up_QF: Tensor) -> Tensor:
        (activation,) = self._activation
        gate = getattr(type(activation), "_apply_gate", _default_apply_gate)
        hidden_QF: Tensor = gate(activation, up_QF) if self.is_gated else activation.act_fn(up_QF)
        return hidden_QF

    def _apply_linear(self, rows_QH: Tensor, name: str, ends_e: Tensor, weights_Q1: Tensor | None = None) -> Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        out = grouped_linear(rows_QH, weight.transpose(1, 2) if self.is_transposed else weight, ends_e)
        return out if bias is None else grouped_bias(out, bias, ends_e, weights_Q1)


def is_swiglu(original: nn.Module) -> bool:
    """Whether experts are networks down(act(gate(x)) * up(x)) without biases, clamps, or another order of weights."""
    names = {name for name, _ in original.named_parameters()}
    is_default = getattr(type(original), "_apply_gate", None) is _default_apply_gate
    return (
        is_default
        and names == {GATE_UP, DOWN}
        and not dict(original.named_buffers())
        and bool(getattr(original, "is_concatenated", True))
        and not getattr(original, "is_transposed", False)
        and not getattr(original, "has_bias", False)
    )


def _is_transposed(original: nn.Module) -> bool:
    marked = getattr(original, "is_transposed", None)  # by transformers, where it can choose an implementation
    stacked = {name: parameter.shape for name, parameter in original.named_parameters()}
    if marked is None and GATE_UP in stacked:
        return stacked[GATE_UP][2] == 2 * stacked[DOWN][1]
    return bool(marked)


def check_experts(original: nn.Module, make: Callable[[nn.Module, int], Experts]) -> None:
    """Compare the family's experts with those that take their place, on random tokens: results and gradients.

    Args:
        original: The family's module; only its attributes are used, so that it may be on the meta device.
        make: Makes experts of this package from a module and a number of experts.

    Raises:
        ValueError: They differ.
    """
    theirs = _small_copy(original)
    ours = make(theirs, 2)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs.get_parameter(name))
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(SMALL_TOKENS, SMALL_WIDTH, generator=generator, requires_grad=True)
    weights_T = torch.rand(SMALL_TOKENS, generator=generator)
    first = SMALL_TOKENS // 2
    ids_T1 = (torch.arange(SMALL_TOKENS) >= first).long().unsqueeze(1)
    ends_e = torch.tensor([first, SMALL_TOKENS], dtype=torch.int32)
    with torch.enable_grad():
        results = [theirs(hidden_TD, ids_T1, weights_T.unsqueeze(1)), ours(hidden_TD, weights_T, ends_e)]
        gradients = [torch.autograd.grad(result.square().sum(), hidden_TD)[0] for result in results]
    for wanted, found in (results, gradients):
        if not torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.detach().abs().max())):
            raise ValueError(
                f"its experts ({type(original).__name__}) compute something else than the layers, biases and "
                "activation that they name"
            )


def _small_copy(original: nn.Module) -> nn.Module:
    """Copy experts with 2 of them and small widths, on the CPU, large enough to reach clamps."""
    copied: Any = copy.copy(original)
    generator = torch.Generator().manual_seed(0)
    is_transposed = _is_transposed(original)
    widths = {GATE_UP: (2 * SMALL_EXPERT_WIDTH, SMALL_WIDTH), UP: (SMALL_EXPERT_WIDTH, SMALL_WIDTH)}
    widths[DOWN] = (SMALL_WIDTH, SMALL_EXPERT_WIDTH)
    copied._parameters = {}
    for name, _ in original.named_parameters():
        rows, columns = widths[name.removesuffix("_bias")]
        shape = (rows,) if name.endswith("_bias") else (columns, rows) if is_transposed else (rows, columns)
        copied._parameters[name] = nn.Parameter(2 * torch.randn(2, *shape, generator=generator))
    for name, size in (("num_experts", 2), ("hidden_size", SMALL_WIDTH)):
        if hasattr(copied, name):
            setattr(copied, name, size)
    copied.config = copy.copy(getattr(copied, "config", None))
    if copied.config is not None:
        copied.config._experts_implementation = "eager"
    return copied
