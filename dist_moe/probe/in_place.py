"""Gives a module another class in place: it stays the same object, with its names, tensors, hooks and shards.

So a model can be changed that DDP, FSDP2 or ZeRO-3 has wrapped or sharded already, all of which refer to its modules.
"""

import functools
from typing import Any

from torch import nn


class InPlace(nn.Module):
    """Base of the classes that are put before the class of a module; copies and pickles of a module have them, too."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_restore, type(self).__bases__, *reduced[2:])  # pickle cannot find this class by a name


def change_class(module: nn.Module, first: type[InPlace], **attributes: Any) -> None:
    """Put a class before that of a module, whose methods it may override.

    Args:
        module: Changed in place.
        first: The class.
        attributes: What its methods read of the module.
    """
    kinds: tuple[Any, Any] = (first, type(module))
    module.__class__ = _class_of(*kinds)
    vars(module).update(attributes)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward of a module is that of its class: not one by which a framework has replaced it."""
    return "forward" not in vars(module)


@functools.cache
def _class_of(first: Any, original: Any) -> Any:
    """Return the class, under the name of the original one, by which frameworks and transformers identify modules."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (first, original), names)


def _restore(first: Any, original: Any) -> Any:
    kind = _class_of(first, original)
    return kind.__new__(kind)
