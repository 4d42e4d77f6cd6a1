"""Counts of one layer's routing: integers, so that sums over micro-batches and ranks are exact.

Shapes: T tokens, E experts, K columns (the maximum number of experts a token takes), Q bins of the margins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.comm.reduce import all_reduce_counts


class RoutingCounts(NamedTuple):
    """Counts of one layer over some tokens, int64.

    Attributes:
        load_E: Assignments that each expert received.
        k_histogram_K: Tokens that took 1, 2, .. K experts.
        margins_EQ: Histograms of `margins.count_margins`; None where the policy does not need them.
        unrouted: Tokens that took no expert and are not padding, a scalar; None where the rule of routing gives each
            token one.
        top_k: Experts that a token is to take on average, for the update rule; None before the counts are summed.
    """

    load_E: Tensor
    k_histogram_K: Tensor
    margins_EQ: Tensor | None = None
    unrouted: Tensor | None = None
    top_k: int | None = None


def count_routing(ids_TK: Tensor, experts: int, max_experts_per_token: int) -> RoutingCounts:
    """Count the assignments of some tokens, without margins.

    Args:
        ids_TK: Experts of each token; -1 is an empty slot.
        experts: E.
        max_experts_per_token: K of the result, which may be more than the columns of ids_TK.
    """
    load_E = count_values(ids_TK.reshape(-1) + 1, experts + 1)[1:]
    k_histogram = count_values((ids_TK >= 0).sum(dim=1), max_experts_per_token + 1)
    return RoutingCounts(load_E, k_histogram[1:])  # a token without experts is padding, or counted as unrouted


def count_values(values: Tensor, size: int) -> Tensor:
    """Count how often each of 0 to size - 1 occurs in int64 values of these -> [size] int64.

    As `torch.bincount`, which waits for a CUDA device, because the size of its result depends on the values.
    """
    return values.new_zeros(size).scatter_add_(0, values, torch.ones_like(values))


def unrouted_tokens(routing_counts: Sequence[RoutingCounts]) -> list[int]:
    """For each layer the tokens that took no expert and are not padding."""
    return [0 if layer_counts.unrouted is None else int(layer_counts.unrouted) for layer_counts in routing_counts]


def add_counts(first: Sequence[RoutingCounts], second: Sequence[RoutingCounts]) -> list[RoutingCounts]:
    """Add the counts of two micro-batches, layer by layer."""
    return [_sum(left, right) for left, right in zip(first, second, strict=True)]


def all_reduce_routing_counts(
    routing_counts: Sequence[RoutingCounts], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[RoutingCounts]:
    """Sum over the ranks of a group in ONE all-reduce for all layers. Collective; the shapes are equal on each."""
    flat = [count for layer_counts in routing_counts for count in layer_counts if isinstance(count, Tensor)]
    summed = iter(all_reduce_counts(flat, device, group))
    return [
        RoutingCounts(*(None if count is None else next(summed) for count in layer_counts))  # type: ignore[arg-type]
        for layer_counts in routing_counts
    ]


def _sum(left: RoutingCounts, right: RoutingCounts) -> RoutingCounts:
    pairs = zip(left, right, strict=True)
    return RoutingCounts(*(None if one is None or other is None else one + other for one, other in pairs))  # type: ignore[arg-type]
