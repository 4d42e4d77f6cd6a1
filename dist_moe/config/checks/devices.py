"""What computes on a GPU alone, where the workers compute on the CPU."""

from dist_moe.config.schema import Config
from dist_moe.errors import Violation

CPU_BACKENDS = ("gloo", "mpi")
GPU_ONLY = ("liger", "triton")


def device_violations(config: Config) -> list[Violation]:
    """Whether an implementation needs another device than that of the backend.

    With parallel.backend=auto or nccl the device, and what is installed for it, is known to the workers alone.
    """
    backend = config.parallel.backend
    if backend not in CPU_BACKENDS:
        return []
    rule = f"needs a GPU, and parallel.backend={backend} computes on the CPU"
    return [
        Violation(f"model.{key}", name, rule, "use auto, or set parallel.backend=nccl")
        for key, name in (("cross_entropy", config.model.cross_entropy), ("moe_kernels", config.model.moe_kernels))
        if name in GPU_ONLY
    ]
