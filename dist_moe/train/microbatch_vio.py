"""MaxVio of computation batches: what experts compute at once, one micro-batch of one expert-parallel group.

Shapes: M micro-batches, E experts of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_moe.balancing.load import mean_max_vio
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_reduce_counts
from dist_moe.policies.shares import Shares


def microbatch_max_vio(
    micro_loads: Sequence[Sequence[Tensor]], mesh: Mesh, device: torch.device, shares: Shares = None
) -> list[tuple[float, float]]:
    """Return the mean MaxVio of the computation batches of this rank's expert-parallel group, and its floor.

    An expert waits only for the ranks that send to it, so its computation batch is one micro-batch of all ranks of one
    expert-parallel group (Wang et al. 2024, arXiv 2408.15664, on expert parallelism). A collective call: ONE
    all-reduce within the group, and none without expert parallelism.

    Args:
        micro_loads: This rank's own int64 load_E, for each micro-batch a list over the layers.
        mesh: The layout of the ranks.
        device: The device of the collective.
        shares: The target shares of the experts of every layer; None for equal shares.

    Returns:
        (MaxVio, sampling floor) for each layer.
    """
    load_LME = [torch.stack(layer) for layer in zip(*micro_loads, strict=True)]
    if mesh.ep_group is not None:
        load_LME = all_reduce_counts(load_LME, device, mesh.ep_group)
    return [mean_max_vio(load_ME.cpu(), shares) for load_ME in load_LME]
