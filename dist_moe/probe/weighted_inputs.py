"""Blocks that compute every expert for every token, from its input times the gate weight, 0 where it is not taken.

Llama 4 has such blocks. Their routers then return the experts that are taken, and their experts get these, as in other
families; the block is changed where a copy of it, with other parts, computes the same afterwards.

Shapes: T tokens, D model width, E experts, K experts a token takes.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.probe.in_place import InPlace, change_class, has_own_forward
from dist_moe.probe.layers import FoundLayer
from dist_moe.probe.own_bias import full_shape
from dist_moe.probe.router_copy import RouterCopy

TOKENS = 16
"""With which a copy of a block is called: few, since it has a row of each for every expert."""
TOLERANCE = 1e-5


class Scores(NamedTuple):
    """The scores that a router returns.

    Attributes:
        place: Their place among its two results.
        top_k: K.
        experts: E.
    """

    place: int
    top_k: int
    experts: int


class SparseScoresRouter(InPlace):
    """A router that returned a score of every expert, 0 for those that are not taken; returns (logits, weights, ids).

    Attributes:
        scores_place: Where it had the scores among its two results.
        top_k: K.
    """

    scores_place: int
    top_k: int

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [T, E], and the gate weights and ids [T, K] of the experts that are taken."""
        returned = super().forward(hidden_TD)
        weights_TK, ids_TK = returned[self.scores_place].topk(self.top_k)
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


def exchange_selected_experts(layer: FoundLayer) -> None:
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
        copied = RouterCopy(router, None)
        scores = _read_scores(copied)
    except UserError:  # the probe of the router says what it is
        return
    if scores is None or getattr(experts, "num_experts", None) != scores.experts:
        return
    is_whole = all(full_shape(each)[0] == scores.experts for each in experts.parameters())
    if is_whole and _computes_the_same(block, names, copied, scores):
        _change(block, (router, experts), names, scores)


def _change(block: nn.Module, parts: tuple[nn.Module, nn.Module], names: tuple[str, str], scores: Scores) -> None:
    router, experts = parts
    change_class(router, SparseScoresRouter, scores_place=scores.place, top_k=scores.top_k)
    change_class(experts, InputWeightedExperts)
    change_class(block, InputWeightedBlock, router_name=names[0], experts_name=names[1])


def _read_scores(copied: RouterCopy) -> Scores | None:
    """Find the scores among the results of a router; None where it returns something else than these and logits."""
    results = copied.call(None).returned
    is_pair = len(results) == 2 and all(isinstance(each, Tensor) and each.ndim == 2 for each in results)
    if not is_pair or results[0].shape != results[1].shape:
        return None
    for place, scores_TE in enumerate(results):
        taken_T = (scores_TE != 0).sum(dim=1)
        taken, experts = int(taken_T[0]), scores_TE.shape[1]
        if 0 < taken < experts and bool((taken_T == taken).all()) and bool((scores_TE >= 0).all()):
            return Scores(place, taken, experts)
    return None


def _computes_the_same(block: nn.Module, names: tuple[str, str], copied: RouterCopy, scores: Scores) -> bool:
    """Whether a copy of a block, with other experts and other children, computes the same after the change.

    That holds for experts and children of any kind, since those of the copy show which rows they are called with.
    """
    shell: nn.Module = object.__new__(type(block))
    nn.Module.__init__(shell)
    vars(shell).update({name: value for name, value in vars(block).items() if not name.startswith("_")})
    hidden_BTD = copied.hidden_TD[:TOKENS].unsqueeze(0)
    parts_of_copy = {names[0]: copied.router, names[1]: _Rows(scores.experts, hidden_BTD.shape[-1])}
    for index, (name, _) in enumerate(block.named_children()):
        shell.add_module(name, parts_of_copy.get(name, _Sine(index + 1)))
    parts = shell.get_submodule(names[0]), shell.get_submodule(names[1])
    runs = []
    with torch.enable_grad():
        for is_changed in (False, True):
            if is_changed:
                _change(shell, parts, names, scores)
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
