"""Evaluation on held-out text: loss, bits per byte, and the load over the whole set."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_moe.balance.counts import RoutingCounts, add_counts, all_reduce_routing_counts
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_reduce_scalars
from dist_moe.config import Config
from dist_moe.data.corpus import TokenizedData
from dist_moe.data.stream import IGNORE_INDEX, PADDING, Stream
from dist_moe.model.inputs import model_inputs
from dist_moe.model.task import Output
from dist_moe.observe.evaluation import EvaluationMetrics, evaluation_metrics


@dataclass(frozen=True)
class ValidationSet:
    """The held-out text to evaluate: rows 0 to `rows` - 1 of the validation split, in file order.

    Attributes:
        stream: The rows of the validation split.
        token_bytes_V: int64, bytes of text that each token id stands for.
        rows: Number of rows to evaluate.
        micro_batch_size: Rows of one forward.
    """

    stream: Stream
    token_bytes_V: np.ndarray[Any, Any]
    rows: int
    micro_batch_size: int


def validation_set(config: Config, data: TokenizedData) -> ValidationSet:
    """Return the first `observe.validation_sequences` rows of the validation split; all of them where it is 0."""
    stream = Stream(data.validation, config.data.sequence_length, seed=0)
    limit = config.observe.validation_sequences
    rows = min(limit, stream.rows_per_epoch) if limit else stream.rows_per_epoch
    # Further rows of a forward would be padding alone.
    size = max(1, min(config.train.sequences_per_forward, rows))
    return ValidationSet(stream, data.tokenizer.token_bytes_V, rows, size)


@torch.no_grad()
def evaluate(task: nn.Module, text: ValidationSet, mesh: Mesh, device: torch.device, step: int) -> EvaluationMetrics:
    """Evaluate `task` with the rows divided over all ranks. A collective call.

    Each rank runs the same number of forwards, with rows of padding after the end of the text, because the experts'
    collectives need every rank. The balancer is not involved, and nothing is updated.

    Args:
        task: The model and its loss, a `LanguageModelTask`.
        text: The rows to evaluate.
        mesh: The layout of the ranks.
        device: The device of the task.
        step: The optimizer step to record.

    Returns:
        The metrics over all ranks, equal on each.
    """
    stride = mesh.world_size * text.micro_batch_size
    nats, labels, text_bytes = 0.0, 0, 0
    routing_counts: list[RoutingCounts] | None = None
    was_training = task.training
    task.eval()
    try:
        for first in range(0, text.rows, stride):
            batch_nats, batch_labels, batch_bytes, batch_counts = _forward(task, text, first, mesh, device)
            nats, labels, text_bytes = nats + batch_nats, labels + batch_labels, text_bytes + batch_bytes
            routing_counts = batch_counts if routing_counts is None else add_counts(routing_counts, batch_counts)
    finally:
        task.train(was_training)
    summed = all_reduce_routing_counts(routing_counts or [], device)
    total = all_reduce_scalars({"nats": nats, "labels": labels, "bytes": text_bytes}, device)
    return evaluation_metrics(
        step=step,
        total_nats=total["nats"],
        tokens=int(total["labels"]),
        text_bytes=int(total["bytes"]),
        load_L=[layer_counts.load_E.cpu() for layer_counts in summed],
        k_histogram_L=[layer_counts.k_histogram_K.cpu() for layer_counts in summed],
    )


def _forward(
    task: nn.Module, text: ValidationSet, first: int, mesh: Mesh, device: torch.device
) -> tuple[float, int, int, list[RoutingCounts]]:
    """Run one forward of this rank.

    Returns:
        The sum of -ln p in nats, the label tokens, the bytes of text that these stand for, and the routing counts.
    """
    row = first + mesh.rank * text.micro_batch_size
    batch = text.stream.rows_in_file_order(row, text.micro_batch_size)
    # Rows past the limit belong to the corpus but not to this evaluation.
    outside_B = torch.arange(row, row + text.micro_batch_size) >= text.rows
    outside_B1 = outside_B.unsqueeze(1)
    targets_BS = batch.targets_BS.masked_fill(outside_B1, IGNORE_INDEX)
    documents_BS = batch.documents_BS.masked_fill(outside_B1, PADDING)
    inputs = model_inputs(batch._replace(targets_BS=targets_BS, documents_BS=documents_BS), device)
    output: Output = task(inputs, torch.ones((), device=device))
    labels = targets_BS[targets_BS != IGNORE_INDEX].numpy()
    nats = float(output.nll_sum)
    if not math.isfinite(nats):
        nats = math.nan
    # The balancer is not involved in an evaluation, so the histograms of margins are neither kept nor summed.
    routing_counts = [layer_counts._replace(margins_EQ=None) for layer_counts in output.routing_counts]
    return nats, labels.size, int(text.token_bytes_V[labels].sum()), routing_counts
