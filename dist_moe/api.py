"""The public functions and classes of the package; `import dist_moe` imports them when they are first used."""

from dist_moe.attach.balancer import Balancer, Layer, balance
from dist_moe.attach.load import Load
from dist_moe.attach.writer import LoadWriter
from dist_moe.errors import UserError
from dist_moe.replace.loading import from_pretrained
from dist_moe.replace.parallel import clip_grad_norm_, expert_parameters, parallelize
from dist_moe.replace.routing import route
from dist_moe.replace.saving import save_pretrained

__all__ = [
    "Balancer",
    "Layer",
    "Load",
    "LoadWriter",
    "UserError",
    "balance",
    "clip_grad_norm_",
    "expert_parameters",
    "from_pretrained",
    "parallelize",
    "route",
    "save_pretrained",
]
