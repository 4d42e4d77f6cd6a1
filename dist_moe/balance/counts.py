"""What is counted of one layer's routing: integers, so that sums over micro-batches and ranks are exact.

Shapes: T tokens, E experts, K experts a token takes at most, Q bins of the quantile histograms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.comm.reduce import all_reduce_counts


class RoutingCounts(NamedTuple):
    """Counts of one layer over some tokens, int64.

    load_E: assignments that each expert received. takers_K: tokens that took 1, 2, .. K experts. margins_EQ: the
    histograms of `quantile.count_margins`; None where no policy reads them.
    """

    load_E: Tensor
    k_histogram_K: Tensor
    margins_EQ: Tensor | None = None


def count_routing(ids_TK: Tensor, experts: int, max_experts_per_token: int) -> RoutingCounts:
    """Count ids_TK (-1: an empty slot); most: K, the experts a token may take, which may be more than the columns."""
    ids = ids_TK.reshape(-1)
    load_E = torch.bincount(ids[ids >= 0], minlength=experts)
    takers = torch.bincount((ids_TK >= 0).sum(dim=1), minlength=max_experts_per_token + 1)
    return RoutingCounts(load_E, takers[1:])  # a token that took none is padding


def add_counts(ones: Sequence[RoutingCounts], others: Sequence[RoutingCounts]) -> list[RoutingCounts]:
    """The sums, layer by layer."""
    return [_added(one, other) for one, other in zip(ones, others, strict=True)]


def all_reduce_routing_counts(routing_counts: Sequence[RoutingCounts], device: torch.device) -> list[RoutingCounts]:
    """Sum over all ranks in ONE all-reduce for all layers; every rank calls it with the same shapes."""
    flat = [count for layer_counts in routing_counts for count in layer_counts if count is not None]
    summed = iter(all_reduce_counts(flat, device))
    return [
        RoutingCounts(next(summed), next(summed), None if layer_counts.margins_EQ is None else next(summed))
        for layer_counts in routing_counts
    ]


def _added(one: RoutingCounts, other: RoutingCounts) -> RoutingCounts:
    margins_EQ = None
    if one.margins_EQ is not None and other.margins_EQ is not None:
        margins_EQ = one.margins_EQ + other.margins_EQ
    return RoutingCounts(one.load_E + other.load_E, one.k_histogram_K + other.k_histogram_K, margins_EQ)
