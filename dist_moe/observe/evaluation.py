"""The record of one evaluation, and the pure function that builds it.

Shapes: L MoE layers, E routed experts of a layer, K the most experts that a token takes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dist_moe.observe.measures import mean, measure_load, shared_fields
from dist_moe.policies.shares import Shares

TASK_METRICS = ("accuracy", "macro_f1", "matthews", "pearson", "spearman")
OF_LABELS = (*TASK_METRICS, "correct_examples")
# Of a task with labeled texts, metrics.jsonl has no bytes, and counts texts.
OF_BYTES, TEXT_FIELDS = ("bits_per_byte", "bytes"), {"tokens": "examples"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMetrics:
    """One evaluation over all ranks. Load measures are those of the whole pass (MaxVio_global).

    Unless noted otherwise, a value is the mean over layers, and NaN for a model without MoE layers. A floor is the
    expected value under uniform random routing.
    """

    step: int
    validation_loss: float  # nats per label token, or per text; of a regression the mean squared error
    bits_per_byte: float  # NaN where no text was predicted, of documents of one token
    tokens: int  # label tokens, or labeled texts
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
    unrouted_percent: float  # of the tokens of all layers that took no expert, which expert thresholds allow
    max_vio_global_per_layer: tuple[float, ...]
    max_vio_global_floor_per_layer: tuple[float, ...]
    load_deviation_percent_per_layer: tuple[float, ...]
    load_deviation_percent_floor_per_layer: tuple[float, ...]
    experts_per_token_per_layer: tuple[float, ...]
    load: tuple[tuple[int, ...], ...]  # [L][E] assignments
    # Of labeled texts, each of which is a label: classes (accuracy, ...) or values (pearson, ...).
    accuracy: float | None = None
    macro_f1: float | None = None
    matthews: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    correct_examples: str | None = None  # of classes: which are right, a bit for each example in hexadecimal digits

    @property
    def task_metrics(self) -> dict[str, float]:
        """The metrics of a task with labeled texts, by name; empty for a language model."""
        return {name: value for name in TASK_METRICS if (value := getattr(self, name)) is not None}

    def as_dict(self) -> dict[str, Any]:
        """Return the record of metrics.jsonl: `"event": "validation"` and all fields that the task has."""
        fields = {name: value for name, value in asdict(self).items() if name not in OF_LABELS or value is not None}
        if self.task_metrics:
            fields = {TEXT_FIELDS.get(name, name): value for name, value in fields.items() if name not in OF_BYTES}
        return {"event": "validation", **fields}


def evaluation_metrics(
    *,
    step: int,
    total_nats: float,
    tokens: int,
    text_bytes: int,
    load_L: Sequence[Tensor],
    k_histogram_L: Sequence[Tensor],
    task_metrics: Mapping[str, float] | None = None,
    correct_examples: str | None = None,
    shares: Shares = None,
    unrouted_L: Sequence[int] | None = None,
) -> EvaluationMetrics:
    """Build the record of one evaluation from sums over all its rows and ranks.

    Args:
        step: Training steps before the evaluation.
        total_nats: Cross entropy summed over the label tokens.
        tokens: Label tokens, at least 1.
        text_bytes: Bytes of text that the label tokens cover; 0 where each of them is an end token.
        load_L: L tensors [E] int64, counts of the whole evaluation.
        k_histogram_L: L tensors [K] int64, tokens of the whole evaluation that took 1, 2, .. K experts.
        task_metrics: Those of labeled texts, by their names in the record; None for a language model.
        correct_examples: Which of them have the right class, see `EvaluationMetrics`; None without classes.
        shares: The target shares of the experts of every layer; None for equal shares.
        unrouted_L: For each layer the tokens that took no expert; None for none.

    Raises:
        TypeError: A load or the counts of tokens are not int64.
        ValueError: No token was evaluated, or counts are malformed.
    """
    if tokens < 1:
        raise ValueError("evaluated no label token; evaluate more sequences (observe.validation_sequences)")
    measures = measure_load(load_L, shares)
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
        **shared_fields(measures, k_histogram_L, unrouted_L),
        **dict[str, Any](task_metrics or {}),
        correct_examples=correct_examples,
    )
