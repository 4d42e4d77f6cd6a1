"""The names of tensors in the files of a family, found by program: transformers converts tensors full of numbers.

In memory transformers stacks the experts of a layer, and names tensors in its own way; in the files of a family they
may be apart, transposed or in pieces, and have other names. Its conversion is applied to small tensors that are full of
numbers, so that the result says where each one goes.

Shapes: E experts.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

Shapes = Mapping[str, tuple[int, ...]]
SMALL, LAST = 12, 36
"""The largest size of a dimension of the converted tensors, other than the experts, and of the last dimension of a
stack, by which a transposed one is recognized; divisible by 2, 3 and 4."""
ROWS = 64
"""A number has the tensor times this, and the row in it."""


class Stack(NamedTuple):
    """A tensor of all experts of a layer in memory.

    Attributes:
        parts: (suffix of the name of an expert's tensor, rows), for each expert's tensor in it.
        prefix: The names of the experts' tensors are `PREFIX.INDEX.SUFFIX`.
    """

    parts: tuple[tuple[str, int], ...]
    prefix: str


class Piece(NamedTuple):
    """Some rows of a tensor of this package, in the files.

    Attributes:
        name: The name of the tensor in the files.
        expert: Its index in that tensor, if that has the rows of all experts.
        start: The first row.
        rows: How many.
        row_in_file: The row of the tensor in the files that this one is, where others belong to other tensors; None
            where all belong to this one.
        rows_in_file: The rows of that tensor; 0 without `row_in_file`.
    """

    name: str
    expert: int | None
    start: int
    rows: int
    row_in_file: int | None = None
    rows_in_file: int = 0


class FamilyNames(NamedTuple):
    """Names in the files of a family.

    Attributes:
        stored: Of each tensor, by its name in a folder of this package, that is a tensor of its own there.
        stacked: Of each tensor of all experts of a layer, by its name in memory, that is so in the files.
        is_complete: Whether every tensor is one of its own in the files, so that ranks can write theirs.
        transposed: The tensors in the files, by their names there, whose last two dimensions are swapped: those of
            `stacked` only where their shapes say so.
        pieces: Where the rows are of each tensor that is neither.
        prefix: What the names of the layers' tensors in the files begin with.
        others: The tensors in the files that begin with it and belong to parts of the layers that are not in this
            package's model, by their names there.
        base: What the names of all tensors begin with in the files of a model that has this one as a part.
    """

    stored: Mapping[str, str]
    stacked: Mapping[str, str]
    is_complete: bool
    transposed: frozenset[str] = frozenset()
    pieces: Mapping[str, tuple[Piece, ...]] = {}
    prefix: str = ""
    others: frozenset[str] = frozenset()
    base: str = ""

    def below(self, prefix: str) -> "FamilyNames":
        """Return the names where each begins with a prefix: in the files of a model that has this one as a part."""
        return FamilyNames(
            {ours: prefix + name for ours, name in self.stored.items()},
            {ours: prefix + name for ours, name in self.stacked.items()},
            self.is_complete,
            frozenset(prefix + name for name in self.transposed),
            {ours: tuple(p._replace(name=prefix + p.name) for p in each) for ours, each in self.pieces.items()},
            prefix + self.prefix,
            frozenset(prefix + name for name in self.others),
            prefix,
        )


NO_NAMES = FamilyNames({}, {}, False)


def find_names(
    model: PreTrainedModel, shapes: Shapes, stacks: Mapping[str, Stack], name_in: Callable[[str], str] = str
) -> FamilyNames:
    """Find the names in the files of a family.

    Args:
        model: Of transformers, on the meta device.
        shapes: Of the tensors in a folder of this package, by name.
        stacks: The tensors of all experts of a layer in memory, by name.
        name_in: Returns the name in the model of a name in memory.
    """
    number_of = {name: number for number, name in enumerate(shapes, start=1)}
    state = model.state_dict()
    in_memory: dict[str, Tensor] = {}
    for name in (*stacks, *shapes):
        tensor = state.get(name_in(name))
        if tensor is not None:
            stack = stacks.get(name)
            small = _numbered(tensor, number_of[name]) if stack is None else _numbered_stack(tensor, stack, number_of)
            in_memory[name] = small
    named = {name_in(name): tensor for name, tensor in in_memory.items()}
    prefix = _common_prefix([name_in(name) for name in shapes])
    others = {name for name in state if prefix and name.startswith(prefix) and name not in named}
    try:
        converted = revert_weight_conversion(model, named | {name: _numbered(state[name], 0) for name in others})
    except Exception:  # a conversion that needs the real sizes
        return NO_NAMES
    return _Found(shapes, stacks, in_memory).read(converted)


class _Found:
    """Reads the names off the numbers.

    Args:
        shapes: As of `find_names`.
        stacks: As of `find_names`.
        in_memory: The small tensors, by their names in memory.
    """

    def __init__(self, shapes: Shapes, stacks: Mapping[str, Stack], in_memory: Mapping[str, Tensor]) -> None:
        self.shapes = shapes
        self.of_number = dict(enumerate(shapes, start=1))
        self.small = {name: _small(shape) for name, shape in shapes.items()}
        self.stacks: dict[tuple[int, ...], tuple[str, tuple[int, ...]]] = {}
        for name in stacks.keys() & in_memory.keys():
            tensor = in_memory[name]
            self.stacks[_numbers(tensor)] = name, tuple(tensor.shape)
            for expert, (part, rows) in itertools.product(range(len(tensor)), stacks[name].parts):
                self.small[f"{stacks[name].prefix}.{expert}.{part}"] = (min(rows, SMALL), *tensor.shape[2:])
        self.stored: dict[str, str] = {}
        self.stacked: dict[str, str] = {}
        self.transposed: set[str] = set()
        self.pieces: dict[str, list[tuple[int, int, Piece]]] = {}
        self.others: set[str] = set()

    def read(self, converted: Mapping[str, Tensor]) -> FamilyNames:
        """Return the names of the converted tensors."""
        for name, tensor in converted.items():
            numbers = _numbers(tensor)
            if not any(numbers):
                self.others.add(name)
                continue
            stack, shape = self.stacks.get(numbers, ("", ()))
            if stack and tuple(tensor.shape) in (shape, _swapped(shape)):
                self.stacked[stack] = name
                if tuple(tensor.shape) != shape:
                    self.transposed.add(name)
            elif len(numbers) == 1:
                self._read_one(numbers[0], name, tensor)
            elif tensor.ndim > 1 and len(numbers) == len(tensor):
                for index, part in enumerate(tensor):
                    self._read_part(_numbers(part), name, index, part, len(tensor))
        whole = {name: pieces for name in self.pieces if (pieces := self._all_pieces(name))}
        return FamilyNames(
            self.stored,
            self.stacked,
            self.stored.keys() == self.shapes.keys() and not self.transposed,
            frozenset(self.transposed),
            whole,
            _common_prefix([*self.stored.values(), *self.stacked.values()]),
            frozenset(self.others),
        )

    def _read_one(self, number: int, name: str, tensor: Tensor) -> None:
        """Note where a converted tensor belongs that has the number of one tensor."""
        ours = self.of_number[number]
        small, shape = self.small[ours], tuple(tensor.shape)
        if shape not in (small, _swapped(small)):
            self._read_piece((number,), name, None, tensor)
            return
        self.stored[ours] = name
        is_square = len(small) == 2 and small == _swapped(small)
        if int(tensor[0, -1]) % ROWS > 0 if is_square else shape != small:
            self.transposed.add(name)

    def _read_part(self, numbers: tuple[int, ...], name: str, index: int, part: Tensor, parts: int) -> None:
        """Note whose rows are at an index of a tensor: those of an expert, or the only row of a tensor of one row."""
        ours = self.of_number.get(numbers[0])
        if ours is not None and self.small[ours] == (1, *part.shape):
            self.pieces.setdefault(ours, []).append((0, 1, Piece(name, None, 0, 1, index, parts)))
        elif ours is not None:
            self._read_piece(numbers, name, index, part)

    def _read_piece(self, numbers: tuple[int, ...], name: str, expert: int | None, tensor: Tensor) -> None:
        """Note which rows a tensor has, in its own small rows."""
        ours = self.of_number[numbers[0]]
        if len(numbers) == 1 and tensor.ndim and tuple(tensor.shape[1:]) == self.small[ours][1:]:
            start, rows = int(tensor.flatten()[0]) % ROWS, len(tensor)
            real = self.shapes[ours][0] / self.small[ours][0]
            piece = Piece(name, expert, round(start * real), round(rows * real))
            self.pieces.setdefault(ours, []).append((start, start + rows, piece))

    def _all_pieces(self, ours: str) -> tuple[Piece, ...]:
        """Return the pieces of a tensor in their order; none where they are not all of it."""
        found = sorted(self.pieces[ours])
        starts, ends = [start for start, _, _ in found], [end for _, end, _ in found]
        rows, small = self.shapes[ours][0], self.small[ours][0]
        if [*starts, small] != [0, *ends] or any(rows * end % small for end in ends):
            return ()
        return tuple(piece for _, _, piece in found)


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(size, SMALL) for size in shape)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *shape[:-3:-1])


def _numbered(tensor: Tensor, number: int) -> Tensor:
    """Return a small tensor with its number."""
    return _with_rows(torch.zeros(_small(tensor.shape), dtype=torch.int64), number)


def _with_rows(small: Tensor, number: int) -> Tensor:
    """Return a tensor of this shape whose elements have a number, and their row."""
    if not small.ndim:
        return torch.tensor(number * ROWS)
    rows = torch.arange(len(small)).view(-1, *[1] * (small.ndim - 1))
    return (number * ROWS + rows).expand(small.shape)


def _numbered_stack(tensor: Tensor, stack: Stack, number_of: Mapping[str, int]) -> Tensor:
    """Return a small stack of tensors each of which is full of its number: all experts, a few rows of each part."""
    rows = [min(rows, SMALL) for _, rows in stack.parts]
    last = tuple(min(size, LAST) for size in tensor.shape[2:])
    small = torch.zeros(tensor.shape[0], sum(rows), *last, dtype=torch.int64)
    for expert, experts_rows in enumerate(small):
        for (suffix, _), part in zip(stack.parts, experts_rows.split(rows), strict=True):
            part.copy_(_with_rows(part, number_of[f"{stack.prefix}.{expert}.{suffix}"]))
    return small


def _numbers(tensor: Tensor) -> tuple[int, ...]:
    """Return the numbers of the tensors whose elements it has."""
    return tuple(int(number) for number in (tensor // ROWS).unique())


def _common_prefix(names: Sequence[str]) -> str:
    """Return the parts, separated by dots, with which all names of layers begin."""
    layers = [name.split(".") for name in names if any(part.isdecimal() for part in name.split("."))]
    if not layers:
        return ""
    first, last = min(layers), max(layers)
    depth = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
    return "".join(f"{part}." for part in first[:depth])
