"""Reads and validates the headers of safetensors files, which are untrusted input, without reading their data."""

import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.errors import reason_of

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""Bytes per element of each dtype, by safetensors' names."""
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
INTEGER_DTYPES = ("I64", "I32", "I16", "I8", "U8")
MAX_DIMS = 8
MAX_DIM = 1 << 62


class StoredTensor(NamedTuple):
    """A tensor in a file: its name, dtype by safetensors' name (F32, BF16, ...), shape, and size."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read which tensors a file holds, by name.

    The library checks the size and JSON of the header, the size of each tensor, and that the tensors cover the file
    without gaps or overlaps. What it does not check is checked here: that the file is regular (opening a pipe would
    block), that dtypes are known (others have no size in bytes), and the number and size of dimensions, also of empty
    tensors, whose shape the file's size does not bound.

    Raises:
        CheckpointError: The file cannot be read, or is not a valid safetensors file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with safe_open(path, framework="pt") as file:
            return {name: _stored_tensor(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason_of(error)[:300]}); use another checkpoint") from None


def _stored_tensor(path: Path, name: str, header: Any) -> StoredTensor:
    dtype, shape = header.get_dtype(), tuple(header.get_shape())
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{name[:200]!a} has the unsupported dtype {dtype}")
    if len(shape) > MAX_DIMS or any(size >= MAX_DIM for size in shape):
        raise ValueError(f"{name[:200]!a} has an invalid shape of {len(shape)} dimensions")
    numel = 1
    for size in shape:
        numel *= size
    return StoredTensor(path, name, dtype, shape, numel, numel * DTYPE_BYTES[dtype])
