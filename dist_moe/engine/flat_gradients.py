"""Gradients of parameters in flat tensors: how they are accumulated and averaged over ranks, and their norm."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROW = 1 << 10
"""Elements that `sum_of_squares` adds up together: a number that does not depend on the number of threads."""
BLOCK = 1 << 20
"""Elements that it reads at a time; a copy of those of bf16 in fp64, 8 MiB, stays in the cache."""


@dataclass(frozen=True)
class FlatGroup:
    """Parameters whose gradients are averaged together, and of which each rank of a process group updates a slice.

    Attributes:
        parameters: The parameters, in the order in which they stand in the flat tensor.
        numel: The number of elements of the flat tensor, padding at its end included.
        process_group: The ranks with a copy of these parameters; each has an equal slice of the flat tensor.
    """

    parameters: Sequence[nn.Parameter]
    numel: int
    process_group: dist.ProcessGroup


class FlatGradients:
    """The gradients of one optimizer step.

    Call `add` for each parameter after each backward, then `reduce` once.

    Args:
        groups: All parameters, in groups.
        divisor: What gradients are divided by: the number of ranks over which the loss is averaged.
        dtype: The dtype in which gradients are accumulated and averaged over ranks.
    """

    def __init__(self, groups: Sequence[FlatGroup], divisor: int, dtype: torch.dtype) -> None:
        self._groups, self._divisor, self._dtype = groups, divisor, dtype
        self._flats: list[Tensor] = []
        self._views: dict[nn.Parameter, Tensor] = {}
        self._filled: set[nn.Parameter] = set()

    def add(self, parameter: nn.Parameter) -> None:
        """Move the gradient of a parameter, which is None afterwards, into the flat tensor."""
        if not self._flats:
            self._allocate()
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        view = self._views[parameter]
        if parameter in self._filled:
            view.add_(gradient, alpha=1 / self._divisor)
        else:
            torch.div(gradient, self._divisor, out=view)
            self._filled.add(parameter)

    def reduce(self) -> list[Tensor]:
        """Average the gradients over the ranks. A collective call.

        Returns:
            For each group this rank's slice, fp32 [numel / ranks], with zeros for parameters without a gradient and for
            padding; a tensor that the caller may change.
        """
        if not self._flats:
            self._allocate()
        slices = []
        for group, flat in zip(self._groups, self._flats, strict=True):
            flat[sum(parameter.numel() for parameter in group.parameters) :].zero_()
            for parameter in group.parameters:
                if parameter not in self._filled:
                    self._views[parameter].zero_()
            ranks = dist.get_world_size(group.process_group)
            if ranks > 1:
                dist.all_reduce(flat, group=group.process_group)
            slices.append(flat.chunk(ranks)[dist.get_rank(group.process_group)].float())
        self._flats, self._views, self._filled = [], {}, set()
        return slices

    def _allocate(self) -> None:
        for group in self._groups:
            # What is not reduced is needed in fp32 next, and to convert it here saves one pass over it.
            reduced = dist.get_world_size(group.process_group) > 1
            first = group.parameters[0]
            flat = first.new_empty(group.numel, dtype=self._dtype if reduced else torch.float32)
            sizes = [parameter.numel() for parameter in group.parameters]
            for parameter, view in zip(group.parameters, flat[: sum(sizes)].split(sizes), strict=True):
                self._views[parameter] = view.view(parameter.shape)
            self._flats.append(flat)


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device | str) -> Tensor:
    """Return the sum of the squares of all elements, an fp64 scalar; not finite where one of them is not.

    It depends on values and shapes alone. Squares are computed in fp64: those of fp32 overflow from 2e19 on, and their
    sum before that.

    Args:
        tensors: On one device; there may be none.
        device: That device.
    """
    norms = [torch.zeros(1, dtype=torch.float64, device=device)]
    for tensor in tensors:
        for block in tensor.detach().reshape(-1).split(BLOCK):
            end = block.numel() // ROW * ROW
            for rows in (block[:end].view(-1, ROW), block[end:].view(1, -1)):
                norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
    return torch.cat(norms).square().sum()
