"""Maps the state of this rank's optimizer to elements of named tensors, independent of the parallel layout.

A rank's optimizer keeps fp32 weights and moments in its own tensors: whole parameters at ZeRO 0, one flat slice of a
group of parameters at ZeRO 1 and 2. On disk both are ranges of elements of the tensors of the weights folder, such as
elements 512 to 1023 of `model.layers.1.mlp.experts.3.up_proj.weight`, so that any other layout can find its own there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MASTER = "master"
"""Kind, in a `shard_key`, of fp32 master weights, stored if the model is not fp32; others: `moment_names` and STEPS."""
STEPS = "step"
"""The kind of AdamW's step count, one number per tensor."""


def moment_names(optimizer: str, momentum: float) -> tuple[str, ...]:
    """The names that PyTorch gives to the moments kept per element.

    Args:
        optimizer: "adamw" or "sgd".
        momentum: SGD's momentum; without it SGD keeps nothing.
    """
    if optimizer == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if momentum else ()


class OptimizerFragment(NamedTuple):
    """A range of a parameter, and where the optimizer keeps it.

    Elements `start` to `start + numel` of the flattened `parameter` are elements `offset` to `offset + numel` of the
    flattened `optimizer_tensor`.
    """

    parameter: Tensor
    start: int
    numel: int
    optimizer_tensor: Tensor
    offset: int

    def shard(self, index: int, count: int) -> "OptimizerFragment":
        """Shard `index` of `count`, for ranks that hold the same fragment and share the writing of it."""
        first, end = (self.numel * bound // count for bound in (index, index + 1))
        return self._replace(start=self.start + first, numel=end - first, offset=self.offset + first)


def mapping_is_wrong(fragments: Sequence[OptimizerFragment]) -> bool:
    """Whether the optimizer's weights differ from the model's, so that DeepSpeed's mapping cannot be trusted."""
    for fragment in fragments:
        master = fragment.optimizer_tensor.detach().view(-1)[fragment.offset : fragment.offset + fragment.numel]
        weight = fragment.parameter.detach().view(-1)[fragment.start : fragment.start + fragment.numel]
        # NaN never compares equal; a run with non-finite weights has another problem than the mapping.
        if not torch.equal(master.to(weight), weight) and not bool(master.isnan().any()):
            return True
    return False


class ParameterSlice(NamedTuple):
    """A tensor of the weights folder as elements `start` to `start + numel` of this rank's flattened `parameter`."""

    name: str
    parameter: Tensor
    start: int
    numel: int


class TensorFragment(NamedTuple):
    """A range of a tensor of the weights folder, and where the optimizer keeps it.

    Elements `start` to `start + numel` of the flattened tensor `name` are elements `offset` to `offset + numel` of the
    flattened `optimizer_tensor`.
    """

    name: str
    start: int
    numel: int
    optimizer_tensor: Tensor
    offset: int

    def view_of(self, tensor: Tensor) -> Tensor:
        """This fragment of a tensor with the layout of `optimizer_tensor` (a moment, say), as a view [numel]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def optimizer_fragments(module: nn.Module, optimizer: Any, sharded: bool) -> list[OptimizerFragment]:
    """Return the fragments that DeepSpeed's optimizer of `module` holds on this rank.

    Args:
        module: The wrapped model.
        optimizer: DeepSpeed's optimizer.
        sharded: Whether ZeRO 1 or 2 is used, where DeepSpeed maps each parameter to its slice. At ZeRO 0 fragments are
            whole parameters, of which the bf16 optimizer keeps fp32 copies.
    """
    inner = inner_optimizer(optimizer)
    if not sharded:
        pairs = ((p, p) for group in inner.param_groups for p in group["params"])
        if inner is not optimizer:
            groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            pairs = (pair for weights, masters in groups for pair in zip(weights, masters, strict=True))
        return [OptimizerFragment(weight, 0, weight.numel(), master, 0) for weight, master in pairs]
    fragments = []
    for parameter in module.parameters():
        # DeepSpeed sets the mapping only on parameters of which this rank's flat slice has a part.
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            flat = inner.param_groups[mapping.param_group_index]["params"][0]
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            fragments.append(OptimizerFragment(parameter, source.start, source.numel, flat, target.start))
    return fragments


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The PyTorch optimizer inside DeepSpeed's, which wraps it in bf16 and at ZeRO 1 and 2."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def tensor_fragments(fragments: Sequence[OptimizerFragment], slices: Sequence[ParameterSlice]) -> list[TensorFragment]:
    """Split fragments of parameters along the tensors of the weights folder."""
    slices_of: dict[int, list[ParameterSlice]] = {}
    for part in slices:
        slices_of.setdefault(id(part.parameter), []).append(part)
    result = []
    for fragment in fragments:
        for part in slices_of.get(id(fragment.parameter), []):
            first = max(fragment.start, part.start)
            numel = min(fragment.start + fragment.numel, part.start + part.numel) - first
            if numel > 0:
                offset = fragment.offset + first - fragment.start
                result.append(TensorFragment(part.name, first - part.start, numel, fragment.optimizer_tensor, offset))
    return result


def optimizer_tensors(
    fragments: Sequence[TensorFragment], state: Mapping[Tensor, Mapping[str, Any]], masters: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, elements) of everything that the optimizer keeps for these fragments; mostly views.

    Args:
        fragments: What to read.
        state: The optimizer's state by optimizer tensor.
        masters: Whether the optimizer's weights are fp32 masters, to be stored besides the weights folder.
    """
    for fragment in fragments:
        if masters:
            yield shard_key(MASTER, fragment.name, fragment.start), fragment.view_of(fragment.optimizer_tensor)
        for kind, value in state.get(fragment.optimizer_tensor, {}).items():
            if isinstance(value, Tensor) and value.shape == fragment.optimizer_tensor.shape and kind != STEPS:
                yield shard_key(kind, fragment.name, fragment.start), fragment.view_of(value)
            elif fragment.start == 0 and value is not None:
                # One number per tensor: written by the rank that holds the first element.
                number = torch.as_tensor(value, dtype=torch.float32)
                yield shard_key(kind, fragment.name, 0), number.reshape(1).clone()


def shard_key(kind: str, name: str, start: int) -> str:
    """The key, in a shard file, of the elements of tensor `name` that begin at `start`."""
    return f"{kind}:{name}:{start}"
