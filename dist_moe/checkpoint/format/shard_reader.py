"""Reads what several ranks wrote of the optimizer, by name and by element, whoever held it."""

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.tensor_header import Stored, read_header

RANDOM = "random"
"""The kind of the random states, in bytes; all others are numbers in fp32."""
LONGEST_NUMBER = 18


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file, and read it again to see that it holds these bits -> its path.

    Errors: CheckpointError where it holds others; OSError and SafetensorError where it cannot be written.
    """
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    # As other files are; safetensors lets nobody but the owner read.
    path.chmod(0o666 & ~umask())
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise CheckpointError(f"{path} does not hold what was written ({name}); see to the storage")
    return path


def umask() -> int:
    """That of this process. To ask the system for it is to set it, for all threads; the kernel tells it in a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), 0o022)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


class StoredSlice(NamedTuple):
    """`numel` elements from `start` on, under `key` in `file`."""

    start: int
    numel: int
    file: Any
    key: str


def parse_key(stored: Stored) -> tuple[str, str, int]:
    """(kind, tensor, first element) of the elements in a file; CheckpointError for what are none."""
    kind, _, rest = stored.name.partition(":")
    tensor, _, start = rest.rpartition(":")
    numbered = start.isascii() and start.isdecimal() and len(start) <= LONGEST_NUMBER
    if not (tensor and numbered and len(stored.shape) == 1 and stored.dtype == ("U8" if kind == RANDOM else "F32")):
        raise CheckpointError(
            f"{stored.file} holds {stored.name[:200]!a}, {stored.dtype} {list(stored.shape)}, which are no elements of "
            "a tensor; use another checkpoint"
        )
    return kind, tensor, int(start)


class ShardReader:
    """Files of elements, open for the length of the context; only what is asked for is read.

    Errors: CheckpointError for a file that is none, and for elements that no file holds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: defaultdict[tuple[str, str], list[StoredSlice]] = defaultdict(list)
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for path in sorted(self._folder.glob("rank-*.safetensors")):
                self._open(stack, path)
            self._files = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def _open(self, stack: contextlib.ExitStack, path: Path) -> None:
        header = read_header(path)
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from None
        for name, stored in header.items():
            kind, tensor, start = parse_key(stored)
            self._runs[kind, tensor].append(StoredSlice(start, stored.numel, file, name))

    def holds(self, kind: str, name: str) -> bool:
        """Whether there is anything of this kind."""
        return (kind, name) in self._runs

    def whole(self, kind: str, name: str) -> Tensor:
        """All elements, as `read`."""
        return self.read(kind, name, 0, max(run.start + run.numel for run in self._runs[kind, name]))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """The elements [numel], in the dtype of the file."""
        parts, at, end = [], start, start + numel
        for run in sorted(self._runs.get((kind, name), []), key=lambda run: run.start):
            if run.start <= at < run.start + run.numel and at < end:
                stop = min(end, run.start + run.numel)
                parts.append(run.file.get_slice(run.key)[at - run.start : stop - run.start])
                at = stop
        if at != end:
            raise CheckpointError(
                f"{self._folder} lacks elements {at} to {end - 1} of {kind} of {name}; use another checkpoint, or one "
                "of a run with the same train.optimizer and train.momentum"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]
