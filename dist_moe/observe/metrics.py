"""The records of one training step and of one evaluation, and the pure functions that build them.

Shapes: L MoE layers, E routed experts of a layer (layers may differ in E, so loads are lists of L tensors).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dist_moe.balance.load import cov_floor, dead_experts, load_cov, load_entropy, max_vio, max_vio_floor


@dataclass(frozen=True, slots=True)
class BiasRange:
    """Smallest, largest and mean absolute selection bias of one layer."""

    min: float
    max: float
    abs_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMeasures:
    """What one set of counts says about each layer, with the value that chance alone gives.

    Means over layers are NaN for a model without MoE layers.
    """

    load: tuple[tuple[int, ...], ...]  # [L][E] assignments
    max_vio_per_layer: tuple[float, ...]
    max_vio_floor_per_layer: tuple[float, ...]
    load_cov_per_layer: tuple[float, ...]
    load_cov_floor_per_layer: tuple[float, ...]
    load_entropy_per_layer: tuple[float, ...]
    dead_experts_per_layer: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One logged training step. Load measures are those of this step's global batch (MaxVio_batch)."""

    step: int
    loss: float  # nats per label token
    learning_rate: float
    grad_norm: float  # global 2-norm before clipping
    tokens: int  # processed since step 0, all ranks
    tokens_per_s: float  # all ranks
    step_ms: float
    skipped: bool
    skipped_steps: int  # since step 0
    balance_rate: float  # how far a bias moves in this step
    max_vio: float  # mean over layers, like the four below
    max_vio_floor: float
    load_cov: float
    load_cov_floor: float
    load_entropy: float
    dead_experts: int  # sum over layers
    max_vio_per_layer: tuple[float, ...]
    max_vio_floor_per_layer: tuple[float, ...]
    load_cov_per_layer: tuple[float, ...]
    bias_per_layer: tuple[BiasRange | None, ...]  # None: a layer without a bias
    load: tuple[tuple[int, ...], ...]  # [L][E] assignments, all ranks

    def as_dict(self) -> dict[str, Any]:
        """The line of metrics.jsonl: `"event": "step"` and every field, nested records as dicts."""
        return {"event": "step", **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMetrics:
    """One evaluation, all ranks. Load measures are those of the whole pass (MaxVio_global)."""

    step: int
    validation_loss: float  # nats per label token
    bits_per_byte: float
    tokens: int  # label tokens
    bytes: int  # of text that the label tokens stand for
    max_vio_global: float  # mean over layers, like the floor
    max_vio_global_floor: float
    max_vio_global_per_layer: tuple[float, ...]
    max_vio_global_floor_per_layer: tuple[float, ...]
    load: tuple[tuple[int, ...], ...]  # [L][E] assignments

    def as_dict(self) -> dict[str, Any]:
        """The line of metrics.jsonl: `"event": "validation"` and every field."""
        return {"event": "validation", **asdict(self)}


def measure_load(load_L: Sequence[Tensor]) -> LoadMeasures:
    """Measure the load of each layer.

    Args:
        load_L: L tensors [E] int64 of global counts, on any device; E may differ from layer to layer.

    Raises:
        TypeError: a load is not int64.
        ValueError: a load is not one-dimensional, has no expert, or holds a negative count.
    """
    for layer, load_E in enumerate(load_L):
        if load_E.dim() != 1:
            raise ValueError(
                f"the load of layer {layer} has shape {tuple(load_E.shape)}; it is [E]; pass one tensor per layer"
            )
    loads = [load_E.cpu() for load_E in load_L]
    sizes = [(load_E.numel(), int(load_E.sum())) for load_E in loads]
    return LoadMeasures(
        load=tuple(tuple(load_E.tolist()) for load_E in loads),
        max_vio_per_layer=tuple(float(max_vio(load_E)) for load_E in loads),
        max_vio_floor_per_layer=tuple(max_vio_floor(*size) for size in sizes),
        load_cov_per_layer=tuple(float(load_cov(load_E)) for load_E in loads),
        load_cov_floor_per_layer=tuple(cov_floor(*size) for size in sizes),
        load_entropy_per_layer=tuple(float(load_entropy(load_E)) for load_E in loads),
        dead_experts_per_layer=tuple(int(dead_experts(load_E)) for load_E in loads),
    )


def step_metrics(
    *,
    step: int,
    loss: float,
    learning_rate: float,
    grad_norm: float,
    tokens: int,
    tokens_per_s: float,
    step_ms: float,
    load_L: Sequence[Tensor],
    bias_L: Sequence[Tensor | None],
    balance_rate: float,
    skipped: bool,
    skipped_steps: int,
) -> StepMetrics:
    """Build the record of one training step.

    Args:
        step: number of the step.
        loss: nats per label token, mean over the global batch.
        learning_rate: the one used in this step.
        grad_norm: global 2-norm before clipping.
        tokens: processed since step 0 by all ranks.
        tokens_per_s: of all ranks.
        step_ms: duration of a step.
        load_L: L tensors [E] int64, counts of this step's global batch.
        bias_L: L tensors [E] float32, or None for a layer without a selection bias.
        balance_rate: how far a bias moves in this step.
        skipped: whether this step changed nothing because a loss or gradient was not finite.
        skipped_steps: such steps since step 0.

    Raises:
        TypeError: a load is not int64, or a bias is not float32.
        ValueError: loads and biases differ in number or shape, or a load is malformed.
    """
    measures = measure_load(load_L)
    _check_biases(load_L, bias_L)
    return StepMetrics(
        step=step,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        tokens=tokens,
        tokens_per_s=tokens_per_s,
        step_ms=step_ms,
        skipped=skipped,
        skipped_steps=skipped_steps,
        balance_rate=balance_rate,
        max_vio=_mean(measures.max_vio_per_layer),
        max_vio_floor=_mean(measures.max_vio_floor_per_layer),
        load_cov=_mean(measures.load_cov_per_layer),
        load_cov_floor=_mean(measures.load_cov_floor_per_layer),
        load_entropy=_mean(measures.load_entropy_per_layer),
        dead_experts=sum(measures.dead_experts_per_layer),
        max_vio_per_layer=measures.max_vio_per_layer,
        max_vio_floor_per_layer=measures.max_vio_floor_per_layer,
        load_cov_per_layer=measures.load_cov_per_layer,
        bias_per_layer=tuple(None if bias_E is None else _bias_range(bias_E) for bias_E in bias_L),
        load=measures.load,
    )


def evaluation_metrics(
    *, step: int, total_nats: float, tokens: int, text_bytes: int, load_L: Sequence[Tensor]
) -> EvaluationMetrics:
    """Build the record of one evaluation from sums over all its rows and ranks.

    Args:
        step: training steps behind the evaluated weights.
        total_nats: cross entropy summed over the label tokens.
        tokens: label tokens, at least 1.
        text_bytes: bytes of text that the label tokens stand for, at least 1.
        load_L: L tensors [E] int64, counts of the whole evaluation.

    Raises:
        TypeError: a load is not int64.
        ValueError: no token or no byte was evaluated, or a load is malformed.
    """
    if tokens < 1 or text_bytes < 1:
        raise ValueError(
            f"evaluated {tokens} label tokens and {text_bytes} bytes; a loss per token and byte needs one "
            "of each at least; evaluate more sequences (observe.validation_sequences)"
        )
    measures = measure_load(load_L)
    return EvaluationMetrics(
        step=step,
        validation_loss=total_nats / tokens,
        bits_per_byte=total_nats / math.log(2) / text_bytes,
        tokens=tokens,
        bytes=text_bytes,
        max_vio_global=_mean(measures.max_vio_per_layer),
        max_vio_global_floor=_mean(measures.max_vio_floor_per_layer),
        max_vio_global_per_layer=measures.max_vio_per_layer,
        max_vio_global_floor_per_layer=measures.max_vio_floor_per_layer,
        load=measures.load,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


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
                "since steps of 0.001 are lost in less; look for a cast of the whole model"
            )
        if bias_E.shape != load_E.shape:
            raise ValueError(
                f"the bias of layer {layer} has shape {tuple(bias_E.shape)}, its load {tuple(load_E.shape)}; "
                "both have one number per expert; pass the layers in the same order"
            )
