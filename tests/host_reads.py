"""Counts where the host would wait for a device, and the operators that run, by watching a piece of code on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_FUNCTIONS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"),
    *("bincount", "__bool__", "__int__", "__float__", "__index__", "__len_of_nested__"),
}
"""Functions of torch and methods of tensors whose result is on the host, or has a size that depends on values."""
WAITING_OPERATORS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
NO_KERNEL = {"aten::empty_like", "aten::empty", "aten::new_empty", "aten::promote_types", "aten::_unsafe_view"}
"""Operators that compute nothing on the device."""


class HostReads(TorchFunctionMode):
    """Records the names of the functions, in the block, for which the host waits on a CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and _has_mask(args[1])
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        to_host = name == "to" and any(str(one) == "cpu" for one in (*args[1:], *(kwargs or {}).values()))
        if name in WAITING_FUNCTIONS or by_mask or unsized or to_host:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Records the names of the operators that run in the block, backward passes included.

    Attributes:
        names: All that compute something; not those that make a view, or memory.
        waiting: Those for which the host waits on a CUDA device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.name().split(".")[0] not in NO_KERNEL:
            self.names.append(func.name())
        if func.name().split(".")[0] in WAITING_OPERATORS:
            self.waiting.append(func.name())
        return func(*args, **(kwargs or {}))


def _has_mask(index: Any) -> bool:
    """Whether an index has a boolean tensor, which selects as many elements as it has true values."""
    parts: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)
