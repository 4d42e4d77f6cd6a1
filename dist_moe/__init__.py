"""Distributed expert-parallel training of Mixture-of-Experts models, balanced without an auxiliary loss."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_moe.attach.balancer import Balancer, Layer, balance
    from dist_moe.attach.load import Load
    from dist_moe.attach.writer import LoadWriter
    from dist_moe.errors import UserError
    from dist_moe.replace.loading import from_pretrained
    from dist_moe.replace.parallel import clip_grad_norm_, expert_parameters, parallelize
    from dist_moe.replace.routing import route
    from dist_moe.replace.saving import save_pretrained

DISTRIBUTION = "dist-moe-train"
"""The installed distribution that this package belongs to; another one imports under the same name."""

__version__ = "0.1.0"
__all__ = [
    "Balancer",
    "Layer",
    "Load",
    "LoadWriter",
    "UserError",
    "__version__",
    "balance",
    "clip_grad_norm_",
    "expert_parameters",
    "from_pretrained",
    "parallelize",
    "route",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the commands need neither PyTorch nor transformers to start."""
    if name in __all__:
        import importlib

        from dist_moe.api import PUBLIC

        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
