"""Blocks that compute every expert for every token, from its input times the gate weight, 0 where it is not taken.

Llama 4 has such blocks. Their routers then return the experts that are taken, and their experts get these, as in other
families; the block is changed where a copy of it, with other parts, computes the same afterwards.

Shapes: T tokens, D model width, E experts, K experts a token takes.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.probe.in_place import InPlace, change_class, has_own_forward
from dist_moe.probe.layers import FoundLayer
from dist_moe.probe.own_bias import full_shape
from dist_moe.probe.router_copy import RouterCopy

TOLERANCE = 1e-5


class TakingRouter(InPlace):
    """A router that returned a score of every expert, 0 for those that are not taken; returns (logits, weights, ids).

    Attributes:
        scores_place: Where it had the scores among its two results.
        taken: K.
    """

    scores_place: int
    taken: int

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [T, E], and the gate weights and ids [T, K] of the experts that are taken."""
        returned = super().forward(hidden_TD)
        weights_TK, ids_TK = returned[self.scores_place].topk(self.taken)
        return returned[1 - self.scores_place], weights_TK, ids_TK


class InputWeightedExperts(InPlace):
    """Experts whose input is multiplied by the gate weights, and not their results.

    Their own forward takes [E * T, D], the rows of the first expert first.

    Attributes:
        num_experts: E.
    """

    num_experts: int

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the sum of the results of all experts [T, D]."""
        tokens, width = hidden_TD.shape
        scores_TE = weights_TK.new_zeros(tokens, self.num_experts).scatter(1, ids_TK, weights_TK)
        rows = hidden_TD.repeat(self.num_experts, 1) * scores_TE.transpose(0, 1).reshape(-1, 1)
        results: Tensor = super().forward(rows)
        return results.reshape(self.num_experts, tokens, width).sum(dim=0)


class InputWeightedBlock(InPlace):
    """A block that calls its router and its experts as other families do, and adds the results of its other children.

    Attributes:
        router_name: Of the router among its children.
        experts_name: Of the experts among its children.
    """

    router_name: str
    experts_name: str

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results [T, D] and the logits of the router."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        logits_TE, weights_TK, ids_TK = self.get_submodule(self.router_name)(hidden_TD)
        results_TD: Tensor = self.get_submodule(self.experts_name)(hidden_TD, ids_TK, weights_TK)
        for name, child in self.named_children():
            if name not in (self.router_name, self.experts_name):
                results_TD = results_TD + child(hidden_TD)
        return results_TD, logits_TE


def take_experts(layer: FoundLayer) -> None:
    """Let router, experts and block of a layer exchange the experts that are taken, in place.

    Blocks of other kinds stay as they are.
    """
    block, router, experts = layer.block, layer.router, layer.experts
    if len(inspect.signature(type(experts).forward).parameters) != 2:  # self, and the rows
        return
    children = {id(part): name for name, child in block.named_children() for part in child.modules()}
    names = children[id(router)], children[id(experts)]
    if not all(has_own_forward(part) for part in (block, router, experts)):
        return
    try:
        found = _read_scores(RouterCopy(router, None))
    except UserError:  # the probe of the router says what it is
        return
    if found is None:
        return
    place, taken, count = found
    stacked = all(full_shape(each)[0] == count for each in experts.parameters())
    if stacked and getattr(experts, "num_experts", None) == count and _computes_the_same(layer, names, found):
        _change(block, (router, experts), names, place, taken)


def _change(
    block: nn.Module, parts: tuple[nn.Module, nn.Module], names: tuple[str, str], place: int, taken: int
) -> None:
    router, experts = parts
    change_class(router, TakingRouter, scores_place=place, taken=taken)
    change_class(experts, InputWeightedExperts)
    change_class(block, InputWeightedBlock, router_name=names[0], experts_name=names[1])


def _read_scores(copied: RouterCopy) -> tuple[int, int, int] | None:
    """Return which of two results has the scores, with K and E; None where a router returns something else."""
    results = copied.call(None).returned
    is_pair = len(results) == 2 and all(isinstance(each, Tensor) and each.ndim == 2 for each in results)
    if not is_pair or results[0].shape != results[1].shape:
        return None
    for place, scores_TE in enumerate(results):
        taken_T = (scores_TE != 0).sum(dim=1)
        taken, experts = int(taken_T[0]), scores_TE.shape[1]
        if 0 < taken < experts and bool((taken_T == taken).all()) and bool((scores_TE >= 0).all()):
            return place, taken, experts
    return None


def _computes_the_same(layer: FoundLayer, names: tuple[str, str], found: tuple[int, int, int]) -> bool:
    """Whether a copy of a block, with other experts and other children, computes the same after the change.

    Its experts and its children are of any kind: with the same rows for them, the block computes the same.
    """
    place, taken, experts = found
    copied = RouterCopy(layer.router, None)
    shell = object.__new__(type(layer.block))
    nn.Module.__init__(shell)
    vars(shell).update({name: value for name, value in vars(layer.block).items() if not name.startswith("_")})
    hidden_BTD = copied.hidden_TD.unsqueeze(0)
    width = hidden_BTD.shape[-1]
    for index, (name, _) in enumerate(layer.block.named_children()):
        child = copied.router if name == names[0] else _Rows(experts, width) if name == names[1] else _Sine(index + 1)
        shell.add_module(name, child)
    parts = shell.get_submodule(names[0]), shell.get_submodule(names[1])
    runs = []
    with torch.enable_grad():
        for is_changed in (False, True):
            if is_changed:
                _change(shell, parts, names, place, taken)
            run = _run(shell, hidden_BTD)
            if run is None:
                return False
            runs.append(run)
    return len(runs[0]) == len(runs[1]) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)
        for one, other in zip(*runs, strict=True)
    )


def _run(shell: nn.Module, hidden_BTD: Tensor) -> list[Tensor] | None:
    """Return the results of a block and the gradient of its input; None where it fails."""
    hidden_BTD = hidden_BTD.clone().requires_grad_()
    try:
        returned: Any = shell(hidden_BTD)
        results = list(returned) if isinstance(returned, tuple | list) else [returned]
        loss = torch.stack([each.square().sum() for each in results]).sum()
    except Exception:  # modules of another library raise errors of any type
        return None
    return [*results, torch.autograd.grad(loss, hidden_BTD)[0]]


class _Rows(nn.Module):
    """Experts that compute a function of each element of their rows, which differs from expert to expert."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._factors_E1D = torch.randn(num_experts, 1, width, generator=torch.Generator().manual_seed(0))

    def forward(self, rows: Tensor) -> Tensor:
        rows_ETD = rows.reshape(self.num_experts, -1, rows.shape[-1])
        return (rows_ETD * self._factors_E1D).cos().reshape(rows.shape)


class _Sine(nn.Module):
    """A child that computes a function of each element of its input."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, hidden: Tensor) -> Tensor:
        return (self._factor * hidden).sin()
