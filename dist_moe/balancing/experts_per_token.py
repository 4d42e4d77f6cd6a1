"""How many experts a token takes, from the histogram of tokens by number of experts.

Shapes: K is the maximum number of experts a token of a layer takes; k_histogram_K[n - 1] counts the tokens that took n.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def experts_per_token(k_histogram_K: Tensor, unrouted: int = 0) -> float:
    """Compute the mean number of experts that a token took; 0 if there is no token.

    Args:
        k_histogram_K: [K] int64, tokens that took 1, 2, .. K experts.
        unrouted: Tokens that took none.

    Raises:
        TypeError: The counts are not int64.
        ValueError: The counts have another number of dims, or one is negative.
    """
    counts = _checked(k_histogram_K).tolist()
    tokens = sum(counts) + unrouted
    return sum(taken * count for taken, count in enumerate(counts, start=1)) / tokens if tokens else 0.0


def experts_per_token_percentile(k_histogram_K: Tensor, percent: int, unrouted: int = 0) -> int:
    """Compute the smallest n such that `percent` of 100 tokens took n experts or fewer; 0 if there is no token.

    Args:
        k_histogram_K: [K] int64, tokens that took 1, 2, .. K experts.
        percent: 1 to 100.
        unrouted: Tokens that took none.

    Raises:
        TypeError, ValueError: As `experts_per_token`; ValueError for another `percent`.
    """
    if not 1 <= percent <= 100:
        raise ValueError(f"percent={percent}; it is 1 to 100; use 50 for the median")
    counts = _checked(k_histogram_K)
    tokens = int(counts.sum()) + unrouted
    # Integers throughout, since percent / 100 of a token count may be rounded up by one.
    if 100 * unrouted >= percent * tokens:
        return 0
    return 1 + int((100 * (unrouted + counts.cumsum(dim=0)) < percent * tokens).sum())


def sum_k_histograms(k_histogram_L: Sequence[Tensor]) -> Tensor:
    """Sum the histograms of layers, each as long as its own K.

    Returns:
        int64, as long as the largest K; [0] without layers.

    Raises:
        TypeError, ValueError: As `experts_per_token`.
    """
    total_K = torch.zeros(
        max((len(_checked(k_histogram_K)) for k_histogram_K in k_histogram_L), default=0), dtype=torch.int64
    )
    for k_histogram_K in k_histogram_L:
        total_K[: len(k_histogram_K)] += k_histogram_K.cpu()
    return total_K


def _checked(k_histogram_K: Tensor) -> Tensor:
    if k_histogram_K.dtype != torch.int64:
        raise TypeError(
            f"counts of tokens have dtype {k_histogram_K.dtype}; counts are torch.int64; count with bincount"
        )
    if k_histogram_K.dim() != 1:
        raise ValueError(
            f"counts of tokens have shape {tuple(k_histogram_K.shape)}; it is [K]; pass one tensor per layer"
        )
    if k_histogram_K.numel() and int(k_histogram_K.min()) < 0:
        raise ValueError(f"a count of tokens is {int(k_histogram_K.min())}; it is never negative; count with bincount")
    return k_histogram_K
