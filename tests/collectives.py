"""Counts the collectives that a piece of code makes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


@contextlib.contextmanager
def counted(name: str) -> Iterator[list[str]]:
    """In the block, each call of the function `name` of torch.distributed adds to the list, and does its work."""
    calls: list[str] = []
    real = getattr(dist, name)

    def call(*tensors: Any, **options: Any) -> Any:
        calls.append(name)
        return real(*tensors, **options)

    setattr(dist, name, call)
    try:
        yield calls
    finally:
        setattr(dist, name, real)
