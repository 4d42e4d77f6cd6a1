"""The public functions and classes of the package; `import dist_moe` imports them when they are first used."""

from dist_moe.attach.balancer import Balancer, Layer, balance
from dist_moe.attach.load import Load
from dist_moe.attach.writer import LoadWriter
from dist_moe.errors import UserError

__all__ = ["Balancer", "Layer", "Load", "LoadWriter", "UserError", "balance"]
