"""What is counted of one layer's routing: integers, so that sums over micro-batches and ranks are exact.

Shapes: T tokens, E experts, K experts a token takes at most, Q bins of the quantile histograms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.comm.reduce import sum_counts


class Tally(NamedTuple):
    """Counts of one layer over some tokens, int64.

    load_E: assignments that each expert received. takers_K: tokens that took 1, 2, .. K experts. margins_EQ: the
    histograms of `quantile.count_margins`; None where no policy reads them.
    """

    load_E: Tensor
    takers_K: Tensor
    margins_EQ: Tensor | None = None


def count_routing(ids_TK: Tensor, experts: int, most: int) -> Tally:
    """Count ids_TK (-1: an empty slot); most: K, the experts a token may take, which may be more than the columns."""
    ids = ids_TK.reshape(-1)
    load_E = torch.bincount(ids[ids >= 0], minlength=experts)
    takers = torch.bincount((ids_TK >= 0).sum(dim=1), minlength=most + 1)
    return Tally(load_E, takers[1:])  # a token that took none is padding


def add_tallies(ones: Sequence[Tally], others: Sequence[Tally]) -> list[Tally]:
    """The sums, layer by layer."""
    return [_added(one, other) for one, other in zip(ones, others, strict=True)]


def sum_tallies(tallies: Sequence[Tally], device: torch.device) -> list[Tally]:
    """Sum over all ranks in ONE all-reduce for all layers; every rank calls it with the same shapes."""
    flat = [count for tally in tallies for count in tally if count is not None]
    summed = iter(sum_counts(flat, device))
    return [Tally(next(summed), next(summed), None if tally.margins_EQ is None else next(summed)) for tally in tallies]


def _added(one: Tally, other: Tally) -> Tally:
    margins_EQ = None
    if one.margins_EQ is not None and other.margins_EQ is not None:
        margins_EQ = one.margins_EQ + other.margins_EQ
    return Tally(one.load_E + other.load_E, one.takers_K + other.takers_K, margins_EQ)
