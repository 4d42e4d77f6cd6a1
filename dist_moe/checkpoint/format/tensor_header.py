"""Reads the headers of safetensors files, which strangers may have written, and nothing of their data."""

import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.config.untrusted import LARGEST_TEXT, parse_json

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""The bytes of one number of each dtype, by the words of the format."""
FLOATS = ("F64", "F32", "F16", "BF16")
MOST_DIMS = 8


class Stored(NamedTuple):
    """A tensor in a file: its name, dtype (F32, BF16, ...), shape, and size in elements and bytes."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    bytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; that their bytes are there, one after the other, is seen to.

    Errors: CheckpointError for whatever is no such file. Opening it does not wait, as that of a pipe would.
    """
    try:
        text, size = _text(path)
        entries = parse_json(text)
        entries.pop("__metadata__", None)
        found = {name: _stored(path, name, entry) for name, entry in entries.items()}
        at = 0
        for begin, end, name in sorted((*entry["data_offsets"], name) for name, entry in entries.items()):
            if begin != at or end - begin != found[name].bytes:
                raise ValueError(f"{name[:200]!a} does not begin and end where it should")
            at = end
        if at != size:
            raise ValueError(f"it says that it holds {at} bytes of tensors, and holds {size}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error)[:300]}); use another checkpoint") from None
    return found


def _text(path: Path) -> tuple[str, int]:
    """The header, and the bytes after it."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        if not stat.S_ISREG(status.st_mode) or not 2 <= length <= status.st_size - 8:
            raise ValueError(f"it is no safetensors file, or is cut short: a header of {length} bytes")
        if length > LARGEST_TEXT:
            raise ValueError(f"its header has {length} bytes, more than {LARGEST_TEXT}")
        return file.read(length).decode("utf-8"), status.st_size - 8 - length


def _stored(path: Path, name: str, entry: Any) -> Stored:
    if set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"{name[:200]!a} is of no dtype that is known here, or is not a tensor")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        len(shape) > MOST_DIMS
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, *offsets))
    ):
        raise ValueError(f"{name[:200]!a} has a shape or place that no tensor has")
    numel = 1
    for length in shape:
        numel *= length
    return Stored(path, name, entry["dtype"], tuple(shape), numel, numel * ITEM_BYTES[entry["dtype"]])
