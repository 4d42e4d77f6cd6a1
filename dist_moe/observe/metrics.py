"""The record of one training step, and the pure function that builds it.

Shapes: L MoE layers, E routed experts of a layer, K the most experts that a token takes (layers may differ in E and
K, so counts are lists of L tensors).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dist_moe.balancing.load import max_vio_floor, rank_load
from dist_moe.observe.measures import LoadMeasures, mean, measure_load, per_layer, shared_fields
from dist_moe.policies.shares import Shares


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasRange:
    """Smallest, largest and mean absolute selection bias of one layer."""

    min: float
    max: float
    abs_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress and speed of a run at a logged step: everything but the load."""

    step: int
    loss: float  # nats per label token, mean over the global batch; without the auxiliary loss
    auxiliary_loss: float  # the routing losses times their coefficients, as added to the loss; 0 without any
    learning_rate: float  # of this step
    grad_norm: float  # global 2-norm before clipping
    tokens: int  # processed since step 0, over all ranks
    tokens_per_s: float  # over all ranks; by the wall time since the previous logged step, whatever it was spent on
    step_ms: float  # that time for each step
    skipped: bool  # no update was made, since a loss or gradient was not finite
    skipped_steps: int  # since step 0
    balance_rate: float  # step size of the bias update
    threshold: float | None  # that this step routed with, before its update; None without threshold routing


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics(Progress):
    """One logged training step. Load measures are those of this step's global batch (MaxVio_batch).

    Unless noted otherwise, a value is the mean over layers, and NaN for a model without MoE layers. A floor is the
    expected value under uniform random routing. With `balance.shares`, balance means the load that has these shares,
    and random routing one with these probabilities; `rank_load` is about work and stays that of the rows.
    """

    max_vio: float
    max_vio_floor: float
    max_vio_computation: float  # of one micro-batch in one expert-parallel group; mean over both and over layers
    max_vio_computation_floor: float
    load_cov: float
    load_cov_floor: float
    load_deviation_percent: float  # standard deviation of the experts' shares of the assignments
    load_deviation_percent_floor: float
    load_entropy: float
    load_entropy_floor: float
    dead_experts: int  # sum over layers
    dead_experts_floor: float  # sum over layers
    rank_load: float  # largest / mean rows that the expert-parallel ranks receive; 1 with one rank
    rank_load_floor: float
    experts_per_token: float  # over the tokens of all layers, like the three below; 0 without tokens
    experts_per_token_p50: int
    experts_per_token_p99: int
    experts_per_token_histogram: tuple[int, ...]  # tokens that took 1, 2, .. K experts
    unrouted_percent: float  # of the tokens of all layers that took no expert, which expert thresholds allow
    max_vio_per_layer: tuple[float, ...]
    max_vio_floor_per_layer: tuple[float, ...]
    max_vio_computation_per_layer: tuple[float, ...]
    max_vio_computation_floor_per_layer: tuple[float, ...]
    load_cov_per_layer: tuple[float, ...]
    load_cov_floor_per_layer: tuple[float, ...]
    load_deviation_percent_per_layer: tuple[float, ...]
    load_deviation_percent_floor_per_layer: tuple[float, ...]
    rank_load_per_layer: tuple[float, ...]
    rank_load_floor_per_layer: tuple[float, ...]
    experts_per_token_per_layer: tuple[float, ...]
    bias_per_layer: tuple[BiasRange | None, ...]  # after this step's update; None: a layer without a bias
    load: tuple[tuple[int, ...], ...]  # [L][E] assignments, over all ranks

    def as_dict(self) -> dict[str, Any]:
        """Return the record of metrics.jsonl: `"event": "step"` and all fields, nested records as dicts."""
        # `asdict` copies each number of the load.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        ranges = tuple(None if bias is None else asdict(bias) for bias in self.bias_per_layer)
        return {"event": "step", **values, "bias_per_layer": ranges}


def step_metrics(
    progress: Progress,
    *,
    load_L: Sequence[Tensor],
    k_histogram_L: Sequence[Tensor],
    microbatch_vio_L: Sequence[tuple[float, float]],
    bias_L: Sequence[Tensor | None],
    expert_parallel: int,
    shares: Shares = None,
    unrouted_L: Sequence[int] | None = None,
) -> StepMetrics:
    """Build the record of one training step.

    Args:
        progress: Everything but the load.
        load_L: L tensors [E] int64, counts of this step's global batch.
        k_histogram_L: L tensors [K] int64, tokens of this step's global batch that took 1, 2, .. K experts.
        microbatch_vio_L: MaxVio of each layer's micro-batches and its floor, means over micro-batches and groups.
        bias_L: L tensors [E] float32 after this step's update, or None for a layer without a selection bias.
        expert_parallel: Ranks among which the experts of a layer are divided.
        shares: The target shares of the experts of every layer; None for equal shares.
        unrouted_L: For each layer the tokens that took no expert; None for none.

    Raises:
        TypeError: Counts are not int64, or a bias is not float32.
        ValueError: Counts and biases differ in number or shape, or are malformed.
    """
    measures = measure_load(load_L, shares)
    _check_biases(load_L, bias_L)
    return StepMetrics(
        **asdict(progress),
        **_balance_fields(measures),
        **_microbatch_fields(microbatch_vio_L, layers=len(load_L)),
        **_rank_fields(load_L, expert_parallel),
        **shared_fields(measures, k_histogram_L, unrouted_L),
        bias_per_layer=tuple(None if bias_E is None else _bias_range(bias_E) for bias_E in bias_L),
    )


def _balance_fields(measures: LoadMeasures) -> dict[str, Any]:
    return {
        "max_vio": mean(measures.max_vio_per_layer),
        "max_vio_floor": mean(measures.max_vio_floor_per_layer),
        "max_vio_per_layer": measures.max_vio_per_layer,
        "max_vio_floor_per_layer": measures.max_vio_floor_per_layer,
        "load_cov_per_layer": measures.load_cov_per_layer,
        "load_cov_floor_per_layer": measures.load_cov_floor_per_layer,
        "load_entropy": mean(measures.load_entropy_per_layer),
        "load_entropy_floor": mean(measures.load_entropy_floor_per_layer),
        "dead_experts": sum(measures.dead_experts_per_layer),
        "dead_experts_floor": math.fsum(measures.dead_experts_floor_per_layer),
    }


def _microbatch_fields(microbatch_vio_L: Sequence[tuple[float, float]], layers: int) -> dict[str, Any]:
    if len(microbatch_vio_L) != layers:
        raise ValueError(
            f"microbatch_vio_L has {len(microbatch_vio_L)} values for {layers} loads; each layer has one of each; "
            "pass both for every layer"
        )
    values, floors = tuple(value for value, _ in microbatch_vio_L), tuple(floor for _, floor in microbatch_vio_L)
    return {
        "max_vio_computation": mean(values),
        "max_vio_computation_floor": mean(floors),
        "max_vio_computation_per_layer": values,
        "max_vio_computation_floor_per_layer": floors,
    }


def _rank_fields(load_L: Sequence[Tensor], ranks: int) -> dict[str, Any]:
    values = per_layer(functools.partial(rank_load, ranks=ranks), load_L)
    floors = tuple(1.0 + max_vio_floor(ranks, int(load_E.sum())) for load_E in load_L)
    return {
        "rank_load": mean(values),
        "rank_load_floor": mean(floors),
        "rank_load_per_layer": values,
        "rank_load_floor_per_layer": floors,
    }


def _bias_range(bias_E: Tensor) -> BiasRange:
    bias_E = bias_E.detach().cpu().double()
    return BiasRange(min=float(bias_E.min()), max=float(bias_E.max()), abs_mean=float(bias_E.abs().mean()))


def _check_biases(load_L: Sequence[Tensor], bias_L: Sequence[Tensor | None]) -> None:
    if len(bias_L) != len(load_L):
        raise ValueError(
            f"{len(bias_L)} biases for {len(load_L)} loads; each layer has one of each; "
            "pass None for a layer without a bias"
        )
    for layer, (load_E, bias_E) in enumerate(zip(load_L, bias_L, strict=True)):
        if bias_E is None:
            continue
        if bias_E.dtype != torch.float32:
            raise TypeError(
                f"the bias of layer {layer} has dtype {bias_E.dtype}; a selection bias is torch.float32, "
                "since updates of 0.001 are lost in lower precision; look for a cast of the whole model"
            )
        if bias_E.shape != load_E.shape:
            raise ValueError(
                f"the bias of layer {layer} has shape {tuple(bias_E.shape)}, its load {tuple(load_E.shape)}; "
                "both have one value per expert; pass the layers in the same order"
            )
