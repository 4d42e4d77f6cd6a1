"""What computes on a GPU alone, where the workers compute on the CPU."""

from dist_moe.config.schema import Config
from dist_moe.errors import Violation

CPU_BACKENDS = ("gloo", "mpi")


def device_violations(config: Config) -> list[Violation]:
    """Whether an implementation needs another device than that of the backend.

    With parallel.backend=auto or nccl the device, and what is installed for it, is known to the workers alone.
    """
    name, backend = config.model.cross_entropy, config.parallel.backend
    if name != "liger" or backend not in CPU_BACKENDS:
        return []
    rule = f"needs a GPU, and parallel.backend={backend} computes on the CPU"
    return [Violation("model.cross_entropy", name, rule, "use auto, or set parallel.backend=nccl")]
