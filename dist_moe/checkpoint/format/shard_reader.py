"""Writes safetensors files, and reads elements of the optimizer's tensors from the shards of any number of ranks."""

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
from dist_moe.checkpoint.format.tensor_header import StoredTensor, read_header
from dist_moe.errors import reason_of

RANDOM = "random"
"""The kind of random states, stored as bytes; all other kinds are fp32 numbers."""
MAX_START_DIGITS = 18


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file, and read it again to verify that it holds the same bits.

    Returns:
        `path`.

    Raises:
        CheckpointError: The file holds other bits than were written.
        OSError, SafetensorError: It cannot be written.
    """
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    # safetensors creates files that only the owner can read; give them the mode of any other new file.
    path.chmod(0o666 & ~umask())
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise CheckpointError(f"{path} does not hold what was written ({name}); check the storage")
    return path


def umask() -> int:
    """The umask of this process.

    Read from /proc, because os.umask can only be read by setting it, which affects all threads.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), 0o022)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


class StoredSlice(NamedTuple):
    """Elements `start` to `start + numel` of a tensor, stored under `key` in the open `file`."""

    start: int
    numel: int
    file: Any
    key: str


def parse_key(stored: StoredTensor) -> tuple[str, str, int]:
    """Split the key of a shard's entry, "KIND:TENSOR:START".

    Returns:
        (kind, tensor, first element).

    Raises:
        CheckpointError: The key is not of this form, or the entry has another dtype or more than one dimension.
    """
    kind, _, rest = stored.name.partition(":")
    tensor, _, start = rest.rpartition(":")
    # isdecimal also accepts digits of other scripts; a long number would be slow to parse.
    valid_start = start.isascii() and start.isdecimal() and len(start) <= MAX_START_DIGITS
    dtype = "U8" if kind == RANDOM else "F32"
    if not (tensor and valid_start and len(stored.shape) == 1 and stored.dtype == dtype):
        raise CheckpointError(
            f"{stored.file} holds {stored.name[:200]!a}, {stored.dtype} {list(stored.shape)}, which is not a slice of "
            "a tensor; use another checkpoint"
        )
    return kind, tensor, int(start)


class ShardReader:
    """Reads elements of tensors from the `rank-*.safetensors` files of a folder; a context manager.

    Files are open for the length of the context, and only the requested elements are read.

    Raises:
        CheckpointError: A file is invalid, or no file holds the requested elements.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._slices: defaultdict[tuple[str, str], list[StoredSlice]] = defaultdict(list)
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
            raise CheckpointError(f"{path} cannot be read ({reason_of(error)}); use another checkpoint") from None
        for key, stored in header.items():
            kind, name, start = parse_key(stored)
            self._slices[kind, name].append(StoredSlice(start, stored.numel, file, key))

    def has(self, kind: str, name: str) -> bool:
        """Whether any elements of this kind are stored for the tensor."""
        return (kind, name) in self._slices

    def read_all(self, kind: str, name: str) -> Tensor:
        """All stored elements, as `read`."""
        return self.read(kind, name, 0, max(part.start + part.numel for part in self._slices[kind, name]))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Read elements `start` to `start + numel` -> [numel], in the dtype of the file."""
        parts, position, end = [], start, start + numel
        for stored in sorted(self._slices.get((kind, name), []), key=lambda stored: stored.start):
            if stored.start <= position < stored.start + stored.numel and position < end:
                stop = min(end, stored.start + stored.numel)
                parts.append(stored.file.get_slice(stored.key)[position - stored.start : stop - stored.start])
                position = stop
        if position != end:
            raise CheckpointError(
                f"{self._folder} lacks elements {position} to {end - 1} of {kind} of {name}; use another checkpoint, "
                "or one of a run with the same train.optimizer and train.momentum"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]
