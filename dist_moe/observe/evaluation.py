"""The record of one evaluation, and the pure function that builds it.

Shapes: L MoE layers, E routed experts of a layer, K the most experts that a token takes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dist_moe.observe.measures import mean, measure_load, shared_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMetrics:
    """One evaluation over all ranks. Load measures are those of the whole pass (MaxVio_global).

    Unless noted otherwise, a value is the mean over layers, and NaN for a model without MoE layers. A floor is the
    expected value under uniform random routing.
    """

    step: int
    validation_loss: float  # nats per label token
    bits_per_byte: float  # NaN where no text was predicted, of documents of one token
    tokens: int  # label tokens
    bytes: int  # of text that the label tokens cover
    max_vio_global: float
    max_vio_global_floor: float
    load_cov: float
    load_cov_floor: float
    load_deviation_percent: float  # standard deviation of the experts' shares of the assignments
    load_deviation_percent_floor: float
    experts_per_token: float  # over the tokens of all layers, like the three below; 0 without tokens
    experts_per_token_p50: int
    experts_per_token_p99: int
    experts_per_token_histogram: tuple[int, ...]  # tokens that took 1, 2, .. K experts
    max_vio_global_per_layer: tuple[float, ...]
    max_vio_global_floor_per_layer: tuple[float, ...]
    load_deviation_percent_per_layer: tuple[float, ...]
    load_deviation_percent_floor_per_layer: tuple[float, ...]
    experts_per_token_per_layer: tuple[float, ...]
    load: tuple[tuple[int, ...], ...]  # [L][E] assignments

    def as_dict(self) -> dict[str, Any]:
        """Return the record of metrics.jsonl: `"event": "validation"` and all fields."""
        return {"event": "validation", **asdict(self)}


def evaluation_metrics(
    *,
    step: int,
    total_nats: float,
    tokens: int,
    text_bytes: int,
    load_L: Sequence[Tensor],
    k_histogram_L: Sequence[Tensor],
) -> EvaluationMetrics:
    """Build the record of one evaluation from sums over all its rows and ranks.

    Args:
        step: Training steps before the evaluation.
        total_nats: Cross entropy summed over the label tokens.
        tokens: Label tokens, at least 1.
        text_bytes: Bytes of text that the label tokens cover; 0 where each of them is an end token.
        load_L: L tensors [E] int64, counts of the whole evaluation.
        k_histogram_L: L tensors [K] int64, tokens of the whole evaluation that took 1, 2, .. K experts.

    Raises:
        TypeError: A load or the counts of tokens are not int64.
        ValueError: No token was evaluated, or counts are malformed.
    """
    if tokens < 1:
        raise ValueError("evaluated no label token; evaluate more sequences (observe.validation_sequences)")
    measures = measure_load(load_L)
    return EvaluationMetrics(
        step=step,
        validation_loss=total_nats / tokens,
        bits_per_byte=total_nats / math.log(2) / text_bytes if text_bytes else math.nan,
        tokens=tokens,
        bytes=text_bytes,
        max_vio_global=mean(measures.max_vio_per_layer),
        max_vio_global_floor=mean(measures.max_vio_floor_per_layer),
        max_vio_global_per_layer=measures.max_vio_per_layer,
        max_vio_global_floor_per_layer=measures.max_vio_floor_per_layer,
        **shared_fields(measures, k_histogram_L),
    )
