"""Numbers summed over ranks: exact sums of integer counts, and named scalars in one collective."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_counts(
    counts: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Sum int64 tensors over ranks in ONE all-reduce.

    Integers, because a float32 counter above 2**24 loses single tokens, and bf16 has flipped the sign of a load error.

    Args:
        counts: int64 tensors of any shapes, the same on every rank of the group. An empty list makes no collective.
        device: Where the collective works.
        group: The ranks to sum over; None for all.

    Returns:
        int64 tensors of the same shapes.

    Raises:
        TypeError: A tensor has another dtype.
    """
    wrong = [str(count.dtype) for count in counts if count.dtype != torch.int64]
    if wrong:
        raise TypeError(f"counts are {wrong[0]}; load counts are int64 end to end, so convert where they are made")
    if not counts:
        return []
    packed = torch.cat([count.reshape(-1).to(device) for count in counts])
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(packed, group=group)
    sizes = [count.numel() for count in counts]
    return [part.view(count.shape) for part, count in zip(packed.split(sizes), counts, strict=True)]


def all_reduce_scalars(scalars: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum named numbers over all ranks in one all-reduce in fp64.

    Args:
        scalars: The same names in the same order on every rank.
        device: Where the collective works.
    """
    packed = torch.tensor(list(scalars.values()), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed)
    return dict(zip(scalars, packed.tolist(), strict=True))
