"""Load measures of each layer: pure functions of the counts of a step or an evaluation.

Shapes: L MoE layers, E routed experts of a layer, K the most experts that a token takes (layers may differ in E and
K, so counts are lists of L tensors).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_moe.balancing.experts_per_token import experts_per_token, experts_per_token_percentile, sum_k_histograms
from dist_moe.balancing.load import (
    Shares,
    cov_floor,
    dead_experts,
    dead_experts_floor,
    load_cov,
    load_deviation_percent,
    load_deviation_percent_floor,
    load_entropy,
    load_entropy_floor,
    max_vio,
    max_vio_floor,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMeasures:
    """Load measures of each layer, each with its floor: the expected value under uniform random routing."""

    load: tuple[tuple[int, ...], ...]  # [L][E] assignments
    max_vio_per_layer: tuple[float, ...]
    max_vio_floor_per_layer: tuple[float, ...]
    load_cov_per_layer: tuple[float, ...]
    load_cov_floor_per_layer: tuple[float, ...]
    load_deviation_percent_per_layer: tuple[float, ...]
    load_deviation_percent_floor_per_layer: tuple[float, ...]
    load_entropy_per_layer: tuple[float, ...]
    load_entropy_floor_per_layer: tuple[float, ...]
    dead_experts_per_layer: tuple[int, ...]
    dead_experts_floor_per_layer: tuple[float, ...]


def measure_load(load_L: Sequence[Tensor], shares: Shares = None) -> LoadMeasures:
    """Measure the load of each layer.

    Args:
        load_L: L tensors [E] int64 of global counts, on any device; E may differ from layer to layer.
        shares: The target shares of the E experts of every layer, against which all but the number of dead experts is
            measured; None for equal shares.

    Raises:
        TypeError: A load is not int64.
        ValueError: A load is not one-dimensional, has no expert, or holds a negative count.
    """
    for layer, load_E in enumerate(load_L):
        if load_E.dim() != 1:
            raise ValueError(
                f"the load of layer {layer} has shape {tuple(load_E.shape)}; expected [E]; pass one tensor per layer"
            )
    loads = [load_E.cpu() for load_E in load_L]
    sizes = [(load_E.numel(), int(load_E.sum()), shares) for load_E in loads]
    return LoadMeasures(
        load=tuple(tuple(load_E.tolist()) for load_E in loads),
        max_vio_per_layer=per_layer(functools.partial(max_vio, shares=shares), loads),
        max_vio_floor_per_layer=tuple(max_vio_floor(*size) for size in sizes),
        load_cov_per_layer=per_layer(functools.partial(load_cov, shares=shares), loads),
        load_cov_floor_per_layer=tuple(cov_floor(*size) for size in sizes),
        load_deviation_percent_per_layer=per_layer(functools.partial(load_deviation_percent, shares=shares), loads),
        load_deviation_percent_floor_per_layer=tuple(load_deviation_percent_floor(*size) for size in sizes),
        load_entropy_per_layer=per_layer(functools.partial(load_entropy, shares=shares), loads),
        load_entropy_floor_per_layer=tuple(load_entropy_floor(*size[:2]) for size in sizes),
        dead_experts_per_layer=per_layer(dead_experts, loads),
        dead_experts_floor_per_layer=tuple(dead_experts_floor(*size) for size in sizes),
    )


def per_layer(measure: Callable[[Tensor], Tensor], load_L: Sequence[Tensor]) -> tuple[Any, ...]:
    """Apply a measure of [L, E] to the loads [E] of all layers, at once to consecutive layers of one shape.

    Returns:
        The value of each layer, as a plain number.
    """
    stacks = [
        torch.stack(list(layers))
        for _, layers in itertools.groupby(load_L, key=lambda load_E: (load_E.shape, load_E.dtype))
    ]
    return tuple(value for load_LE in stacks for value in measure(load_LE).tolist())


def shared_fields(
    measures: LoadMeasures, k_histogram_L: Sequence[Tensor], unrouted_L: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compute the fields that the records of a step and of an evaluation have in common, by name.

    Args:
        measures: Of the load of L layers.
        k_histogram_L: L tensors [K] int64, tokens that took 1, 2, .. K experts, on any device.
        unrouted_L: For each layer the tokens that took no expert; None for none.

    Raises:
        TypeError: Counts are not int64.
        ValueError: Counts are not one-dimensional or negative, or their number of layers differs from that of the load.
    """
    if len(k_histogram_L) != len(measures.load):
        raise ValueError(
            f"{len(k_histogram_L)} histograms of experts per token for {len(measures.load)} loads; each layer has one "
            "of each; pass both for every layer"
        )
    k_histogram_K = sum_k_histograms(k_histogram_L)
    unrouted_L = [0] * len(k_histogram_L) if unrouted_L is None else unrouted_L
    unrouted = sum(unrouted_L)
    tokens = int(k_histogram_K.sum()) + unrouted
    return {
        "load": measures.load,
        "load_cov": mean(measures.load_cov_per_layer),
        "load_cov_floor": mean(measures.load_cov_floor_per_layer),
        "load_deviation_percent": mean(measures.load_deviation_percent_per_layer),
        "load_deviation_percent_floor": mean(measures.load_deviation_percent_floor_per_layer),
        "load_deviation_percent_per_layer": measures.load_deviation_percent_per_layer,
        "load_deviation_percent_floor_per_layer": measures.load_deviation_percent_floor_per_layer,
        "experts_per_token": experts_per_token(k_histogram_K, unrouted),
        "experts_per_token_p50": experts_per_token_percentile(k_histogram_K, 50, unrouted),
        "experts_per_token_p99": experts_per_token_percentile(k_histogram_K, 99, unrouted),
        "unrouted_percent": 100.0 * unrouted / tokens if tokens else 0.0,
        "experts_per_token_histogram": tuple(k_histogram_K.tolist()),
        "experts_per_token_per_layer": tuple(map(experts_per_token, k_histogram_L, unrouted_L)),
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean over layers; NaN for a model without MoE layers."""
    return math.fsum(values) / len(values) if values else math.nan
