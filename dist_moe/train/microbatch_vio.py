"""How level the load is of what experts compute at once: one micro-batch of one expert-parallel group.

Shapes: M micro-batches, E experts of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_moe.balance.load import mean_max_vio
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_reduce_counts


def microbatch_max_vio(
    micro_loads: Sequence[Sequence[Tensor]], mesh: Mesh, device: torch.device
) -> list[tuple[float, float]]:
    """MaxVio of the computation batches of this rank's group -> for each layer (MaxVio, floor), means over them.

    An expert waits for the ranks that send to it and no others, so its computation batch is a micro-batch of all ranks
    of one expert-parallel group (Wang et al. 2024, arXiv 2408.15664, on expert parallelism). micro_loads: this
    rank's own int64 load_E, for each micro-batch a list over the layers. ONE all-reduce within the group, and none
    without expert parallelism; every rank of a group calls it alike.
    """
    load_LME = [torch.stack(layer) for layer in zip(*micro_loads, strict=True)]
    if mesh.ep_group is not None:
        load_LME = all_reduce_counts(load_LME, device, mesh.ep_group)
    return [mean_max_vio(load_ME.cpu()) for load_ME in load_LME]
