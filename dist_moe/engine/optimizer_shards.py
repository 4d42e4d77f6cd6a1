"""What this rank's optimizer holds, element by element, under names that no layout is part of.

A rank's optimizer keeps fp32 weights and moments in tensors of its own: whole parameters at ZeRO 0, one flat slice of
a group of parameters at ZeRO 1 and 2. On disk both are runs of elements of the tensors of the weights folder, such as
elements 512 to 1023 of `model.layers.1.mlp.experts.3.up_proj.weight`, so that any other layout finds its own there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MASTER = "master"
"""The kind of the fp32 weights, where the model's own are not fp32; the others are the optimizer's names of moments."""
STEPS = "step"
"""The kind of AdamW's count of steps, one number for each tensor."""


def moments_of(optimizer: str, momentum: float) -> tuple[str, ...]:
    """What "adamw", or "sgd" with this momentum, keeps of every element, by PyTorch's names."""
    if optimizer == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if momentum else ()


class OptimizerFragment(NamedTuple):
    """`numel` elements of `parameter` from `start` on, which the optimizer keeps in `owner` from `offset` on."""

    parameter: Tensor
    start: int
    numel: int
    owner: Tensor
    offset: int

    def part(self, index: int, parts: int) -> "OptimizerFragment":
        """The share of one of several ranks that hold the same."""
        first, end = (self.numel * bound // parts for bound in (index, index + 1))
        return self._replace(start=self.start + first, numel=end - first, offset=self.offset + first)


def mapping_is_wrong(runs: Sequence[OptimizerFragment]) -> bool:
    """Whether the optimizer's weights are not those of the model, so that the runs cannot be where they are told."""
    for run in runs:
        own = run.owner.detach().view(-1)[run.offset : run.offset + run.numel]
        shown = run.parameter.detach().view(-1)[run.start : run.start + run.numel]
        if not torch.equal(own.to(shown), shown) and not bool(own.isnan().any()):
            return True
    return False


class ParameterSlice(NamedTuple):
    """A tensor of the weights folder, and where it lies in this rank's parameter: flat, from `start` on."""

    name: str
    parameter: Tensor
    start: int
    numel: int


class TensorFragment(NamedTuple):
    """`numel` elements of the tensor `name` from `start` on, in `owner` from `offset` on."""

    name: str
    start: int
    numel: int
    owner: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor that lies as the owner does, as a view [numel]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def optimizer_fragments(module: nn.Module, optimizer: Any, sharded: bool) -> list[OptimizerFragment]:
    """What the optimizer that DeepSpeed made for `module` holds on this rank.

    sharded: ZeRO 1 and 2, where each parameter knows its slice; else it is whole, in bf16 as a copy.
    """
    inner = inner_optimizer(optimizer)
    if not sharded:
        pairs = ((p, p) for group in inner.param_groups for p in group["params"])
        if inner is not optimizer:
            groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            pairs = (pair for ours, theirs in groups for pair in zip(ours, theirs, strict=True))
        return [OptimizerFragment(parameter, 0, parameter.numel(), owner, 0) for parameter, owner in pairs]
    found = []
    for parameter in module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            owner = inner.param_groups[mapping.param_group_index]["params"][0]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append(OptimizerFragment(parameter, here.start, here.numel, owner, there.start))
    return found


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer, which DeepSpeed's contains in bf16 and at ZeRO 1 and 2."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def tensor_fragments(runs: Sequence[OptimizerFragment], named: Sequence[ParameterSlice]) -> list[TensorFragment]:
    """What is held, cut along the tensors of the weights folder."""
    by_parameter: dict[int, list[ParameterSlice]] = {}
    for one in named:
        by_parameter.setdefault(id(one.parameter), []).append(one)
    found = []
    for run in runs:
        for one in by_parameter.get(id(run.parameter), []):
            first = max(run.start, one.start)
            numel = min(run.start + run.numel, one.start + one.numel) - first
            if numel > 0:
                found.append(
                    TensorFragment(one.name, first - one.start, numel, run.owner, run.offset + first - run.start)
                )
    return found


def optimizer_tensors(
    found: Sequence[TensorFragment], state: Mapping[Tensor, Mapping[str, Any]], masters: bool
) -> Iterator[tuple[str, Tensor]]:
    """(key, elements) of everything that the optimizer keeps for these pieces.

    state: the optimizer's, by owner. masters: whether its weights are more than what the weights folder holds.
    """
    for piece in found:
        if masters:
            yield key(MASTER, piece.name, piece.start), piece.of(piece.owner)
        for kind, value in state.get(piece.owner, {}).items():
            if isinstance(value, Tensor) and value.shape == piece.owner.shape and kind != STEPS:
                yield key(kind, piece.name, piece.start), piece.of(value)
            elif piece.start == 0 and value is not None:
                yield key(kind, piece.name, 0), torch.as_tensor(value, dtype=torch.float32).reshape(1).clone()


def key(kind: str, name: str, start: int) -> str:
    """What the elements of `name` from `start` on are called in a file."""
    return f"{kind}:{name}:{start}"
