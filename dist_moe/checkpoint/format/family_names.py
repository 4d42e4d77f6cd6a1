"""The names of tensors in the files of a family, found by program: transformers converts tensors full of numbers.

In memory transformers stacks the experts of a layer, and names tensors in its own way; in the files of a family they
may be apart, and have other names. Its conversion is applied to small tensors each of which is full of one number,
so that the result says where each one goes.

Shapes: E experts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dist_moe.families.model_class import language_model_class

Shapes = Mapping[str, tuple[int, ...]]
SMALL = 12
"""The largest size of a dimension of the converted tensors, other than the experts; divisible by 2, 3 and 4."""


class Stack(NamedTuple):
    """A tensor of all experts of a layer in memory.

    Attributes:
        parts: (suffix of the name of an expert's tensor, rows), for each expert's tensor in it.
        prefix: The names of the experts' tensors are `PREFIX.INDEX.SUFFIX`.
    """

    parts: tuple[tuple[str, int], ...]
    prefix: str


class FamilyNames(NamedTuple):
    """Names in the files of a family.

    Attributes:
        stored: Of each tensor, by its name in a folder of this package, that is a tensor of its own there.
        stacked: Of each tensor of all experts of a layer, by its name in memory, that is so in the files.
        is_complete: Whether every tensor is one of its own in the files, so that ranks can write theirs.
    """

    stored: Mapping[str, str]
    stacked: Mapping[str, str]
    is_complete: bool


def find_names(config: PretrainedConfig, shapes: Shapes, stacks: Mapping[str, Stack]) -> FamilyNames:
    """Find the names in the files of a family.

    Args:
        config: Of the model.
        shapes: Of the tensors in a folder of this package, by name.
        stacks: The tensors of all experts of a layer in memory, by name.
    """
    with torch.device("meta"):
        model: PreTrainedModel = language_model_class(config)._from_config(config)
    number_of = {name: number for number, name in enumerate(shapes, start=1)}
    of_number = {number: name for name, number in number_of.items()}
    in_memory = {}
    for name, tensor in model.state_dict().items():
        if name in stacks:
            in_memory[name] = _numbered_stack(tensor, stacks[name], number_of)
        elif name in number_of:
            in_memory[name] = torch.full(_small(tensor.shape), number_of[name])
    numbers_of_stack = {_numbers(in_memory[name]): name for name in stacks}
    try:
        converted = revert_weight_conversion(model, in_memory)
    except Exception:  # a conversion that needs the real sizes
        return FamilyNames({}, {}, False)
    stored, stacked = {}, {}
    for name, tensor in converted.items():
        numbers = _numbers(tensor)
        stack = numbers_of_stack.get(numbers)
        if stack is not None and tensor.shape == in_memory[stack].shape:
            stacked[stack] = name
        elif len(numbers) == 1 and tensor.shape == _small(shapes[of_number[numbers[0]]]):
            stored[of_number[numbers[0]]] = name
    return FamilyNames(stored, stacked, stored.keys() == shapes.keys())


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(size, SMALL) for size in shape)


def _numbered_stack(tensor: Tensor, stack: Stack, number_of: Mapping[str, int]) -> Tensor:
    """Return a small stack of tensors each of which is full of its number: all experts, a few rows of each part."""
    rows = [min(rows, SMALL) for _, rows in stack.parts]
    small = torch.zeros(tensor.shape[0], sum(rows), *_small(tensor.shape[2:]), dtype=torch.int64)
    for expert, experts_rows in enumerate(small):
        for (suffix, _), part in zip(stack.parts, experts_rows.split(rows), strict=True):
            part.fill_(number_of[f"{stack.prefix}.{expert}.{suffix}"])
    return small


def _numbers(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(number) for number in tensor.unique())
