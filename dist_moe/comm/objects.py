"""Small values that ranks exchange, as JSON: nothing that another process sends is unpickled.

Unpickling runs code that the sender chooses. Here each caller names the type that it expects, and anything else is an
error on every rank.
"""

import base64
import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dist_moe.errors import UserError
from dist_moe.text import format_bytes
from dist_moe.untrusted import printable

Object = TypeVar("Object")

LARGEST_BYTES = 1 << 24
"""The largest value, in bytes of JSON. The largest that is sent, the digests of all tensors, takes 100 per tensor."""
BASE64 = ConfigDict(val_json_bytes="base64")
SAME_VERSION = "run the same dist-moe on every host (dist-moe doctor compares the versions)"
MOST_REASON = 200


class ExchangeError(UserError, RuntimeError):
    """A rank sent a value that is too large, or not of the expected type; the message has the rank and the reason."""


def all_gather_objects(
    own: Object, kind: type[Object], group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> list[Object]:
    """Return the value of each rank, by rank; for small values, outside of the training step. A collective call.

    Args:
        own: This rank's value.
        kind: Its type: None, bool, int, float, str, bytes, Path, an Enum, a pydantic model, or a tuple, list, dict,
            NamedTuple, dataclass or union of these. Members of a union must differ in JSON (not `str | bytes`), and a
            set is not supported, since it has no order.
        group: The ranks; None for all.
        device: Where the collective works; None for the current GPU with NCCL, and the CPU otherwise.

    Raises:
        ExchangeError: On every rank, if one of them sent a value that is larger than LARGEST_BYTES or not a `kind`.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [own]
    return decode_all(_all_gather_bytes(encode(own), group, device), kind)


def encode(value: Any) -> bytes:
    """Return a value as JSON. NaN, infinity, integers of any size and lone surrogates (of file names) are kept.

    Raises:
        TypeError: `all_gather_objects` does not support its type.
    """
    return json.dumps(value, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def decode_all(contents: Sequence[bytes], kind: Any) -> list[Any]:
    """Return the values that `encode` wrote, one of each rank. Raises ExchangeError."""
    adapter: TypeAdapter[Any] = TypeAdapter(tuple[kind], config=BASE64)
    return [_decode(content, adapter, kind, rank) for rank, content in enumerate(contents)]


def check_sizes(sizes: Sequence[int]) -> None:
    """Check the announced size of each rank's value, before memory is taken for them. Raises ExchangeError."""
    for rank, size in enumerate(sizes):
        if not 0 < size <= LARGEST_BYTES:
            raise ExchangeError(
                f"rank {rank} announced a value of {size:,} bytes, and ranks accept 1 to {LARGEST_BYTES:,} "
                f"({format_bytes(LARGEST_BYTES)}); {SAME_VERSION}"
            )


def _decode(content: bytes, adapter: TypeAdapter[Any], kind: Any, rank: int) -> Any:
    try:
        # A list becomes a tuple and text a path, so this is not strict; then what it also changed is refused.
        (value,) = adapter.validate_python([json.loads(content.decode("utf-8", "surrogatepass"))], strict=False)
        if encode(value) == content:
            return value
        reason = "it changes when it is converted"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"][1:]))
        reason = f"{place}: {first['msg']}" if place else first["msg"]
    except (ValueError, RecursionError) as error:
        reason = f"it is not JSON: {error}"
    name = kind.__name__ if type(kind) is type else str(kind)
    raise ExchangeError(
        f"rank {rank} sent a value that is not of type {name} ({printable(reason[:MOST_REASON])}); {SAME_VERSION}"
    )


def _plain(value: Any) -> Any:
    """Return what JSON can hold in place of a value that it cannot (`default` of json.dumps)."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, BaseModel):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks; see all_gather_objects")


def _all_gather_bytes(own: bytes, group: dist.ProcessGroup | None, device: torch.device | None) -> list[bytes]:
    """Return the bytes of each rank of a group, in two collectives: of the sizes, and of what has them."""
    ranks = dist.get_world_size(group)
    device = device or torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    sizes = torch.zeros(ranks, dtype=torch.int64, device=device)
    dist.all_gather(list(sizes.split(1)), torch.tensor([len(own)], device=device), group)
    lengths = sizes.tolist()
    check_sizes(lengths)
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    gathered = torch.zeros(ranks, max(lengths), dtype=torch.uint8, device=device)
    dist.all_gather(list(gathered.unbind()), padded.to(device), group)
    rows = gathered.cpu().numpy()
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
