"""Evaluation on held-out text: loss, bits per byte or the metrics of the task, and the load over the whole set."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_moe.balancing.counts import RoutingCounts, add_counts, all_reduce_routing_counts, unrouted_tokens
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_reduce_counts, all_reduce_scalars
from dist_moe.config import Config
from dist_moe.data.labeled.prepare import LabeledData
from dist_moe.data.labeled.stream import ExampleStream, LabeledBatch
from dist_moe.data.stream import IGNORE_INDEX, PADDING, Batch, Stream
from dist_moe.engine.train_state import RunBatch, RunData, RunStream
from dist_moe.model.inputs import model_inputs
from dist_moe.model.tasks.base import Output
from dist_moe.model.tasks.metrics import task_metrics
from dist_moe.observe.evaluation import EvaluationMetrics, evaluation_metrics
from dist_moe.policies.shares import Shares


@dataclass(frozen=True)
class ValidationSet:
    """The held-out text to evaluate: rows 0 to `rows` - 1 of the validation split, in file order.

    Attributes:
        stream: The rows of the validation split.
        token_bytes_V: int64, bytes of text that each token id stands for; empty for labeled examples.
        rows: Number of rows to evaluate.
        micro_batch_size: Rows of one forward.
        classes: Of labeled examples; 0 for a regression and a language model.
    """

    stream: RunStream
    token_bytes_V: np.ndarray[Any, Any]
    rows: int
    micro_batch_size: int
    classes: int = 0


def validation_set(config: Config, data: RunData) -> ValidationSet:
    """Return the first `observe.validation_sequences` rows of the validation split; all of them where it is 0."""
    stream: RunStream
    if isinstance(data, LabeledData):
        stream, classes, token_bytes_V = ExampleStream(data.validation, seed=0), len(data.labels), np.zeros(0, np.int64)
    else:
        stream, classes = Stream(data.validation, config.data.sequence_length, seed=0), 0
        token_bytes_V = data.tokenizer.token_bytes_V
    limit = config.observe.validation_sequences
    rows = min(limit, stream.rows_per_epoch) if limit else stream.rows_per_epoch
    # Further rows of a forward would be padding alone.
    size = max(1, min(config.train.sequences_per_forward, rows))
    return ValidationSet(stream, token_bytes_V, rows, size, classes)


class Sums(NamedTuple):
    """What one forward of this rank adds: the sum of the losses, and what it is a sum over."""

    nats: float
    labels: int
    text_bytes: int


@torch.no_grad()
def evaluate(
    task: nn.Module, text: ValidationSet, mesh: Mesh, device: torch.device, step: int, shares: Shares = None
) -> EvaluationMetrics:
    """Evaluate `task` with the rows divided over all ranks. A collective call.

    Each rank runs the same number of forwards, with rows of padding after the end of the text, because the experts'
    collectives need every rank. The balancer is not involved, and nothing is updated.

    Args:
        task: The model and its loss, a `Task`.
        text: The rows to evaluate.
        mesh: The layout of the ranks.
        device: The device of the task.
        step: The optimizer step to record.
        shares: The target shares of the experts of every layer; None for equal shares.

    Returns:
        The metrics over all ranks, equal on each.
    """
    stride = mesh.world_size * text.micro_batch_size
    sums: list[Sums] = []
    predictions = Predictions(text) if isinstance(text.stream, ExampleStream) else None
    routing_counts: list[RoutingCounts] | None = None
    was_training = task.training
    task.eval()
    try:
        for first in range(0, text.rows, stride):
            row = first + mesh.rank * text.micro_batch_size
            batch = read_rows(text, row)
            output: Output = task(model_inputs(batch, device), torch.ones((), device=device))
            sums.append(_sums(output, batch, text))
            if predictions is not None:
                predictions.add(row, output)
            # The balancer is not involved in an evaluation, so histograms of margins are neither kept nor summed.
            counts = [layer_counts._replace(margins_EQ=None) for layer_counts in output.routing_counts]
            routing_counts = counts if routing_counts is None else add_counts(routing_counts, counts)
    finally:
        task.train(was_training)
    summed = all_reduce_routing_counts(routing_counts or [], device)
    totals = Sums(*(sum(column) for column in zip(*sums, strict=True)))
    total = all_reduce_scalars(totals._asdict(), device)
    if predictions is not None:
        predictions.gather(device)
    return evaluation_metrics(
        step=step,
        total_nats=total["nats"],
        tokens=int(total["labels"]),
        text_bytes=int(total["text_bytes"]),
        load_L=[layer_counts.load_E.cpu() for layer_counts in summed],
        k_histogram_L=[layer_counts.k_histogram_K.cpu() for layer_counts in summed],
        task_metrics=None if predictions is None else predictions.metrics(),
        correct_examples=None if predictions is None else predictions.correct_examples(),
        shares=shares,
        unrouted_L=unrouted_tokens(summed),
    )


def read_rows(text: ValidationSet, row: int) -> RunBatch:
    """Return the rows of one forward, from number `row`; those past the end of the set are padding."""
    batch = text.stream.rows_in_file_order(row, text.micro_batch_size)
    # Rows past the limit belong to the split but not to this evaluation.
    outside_B1 = (torch.arange(row, row + text.micro_batch_size) >= text.rows).unsqueeze(1)
    if isinstance(batch, LabeledBatch):
        return batch._replace(mask_BS=batch.mask_BS & ~outside_B1)
    return batch._replace(
        targets_BS=batch.targets_BS.masked_fill(outside_B1, IGNORE_INDEX),
        documents_BS=batch.documents_BS.masked_fill(outside_B1, PADDING),
    )


def _sums(output: Output, batch: RunBatch, text: ValidationSet) -> Sums:
    nats = float(output.nll_sum)
    text_bytes = 0
    if isinstance(batch, Batch):
        labels = batch.targets_BS[batch.targets_BS != IGNORE_INDEX].numpy()
        text_bytes = int(text.token_bytes_V[labels].sum())
    return Sums(nats if math.isfinite(nats) else math.nan, int(batch.label_count), text_bytes)


class Predictions:
    """The predicted class or value of each example of a validation set, of which each rank computes a part."""

    def __init__(self, text: ValidationSet) -> None:
        assert isinstance(text.stream, ExampleStream)
        self._labels_N = text.stream.labels_N[: text.rows]
        self._classes = text.classes
        self._values_N = torch.zeros(text.rows, dtype=torch.float64)
        self._seen_N = torch.zeros(text.rows, dtype=torch.int64)

    def add(self, row: int, output: Output) -> None:
        """Add the outputs of the examples from number `row` on, without those past the end of the set."""
        outputs_BC = output.outputs_BC
        assert outputs_BC is not None
        values_B: Tensor = outputs_BC.argmax(dim=1) if self._classes else outputs_BC[:, 0]
        inside = slice(row, min(row + len(values_B), len(self._values_N)))
        if (count := inside.stop - row) > 0:
            self._values_N[inside] = values_B[:count].double().cpu()
            self._seen_N[inside] += 1

    def gather(self, device: torch.device) -> None:
        """Take the values of the other ranks. A collective call.

        Raises:
            RuntimeError: An example was not evaluated exactly once.
        """
        # Exact: one rank has the bits of a value, the others zeros.
        bits_N, seen_N = all_reduce_counts([self._values_N.view(torch.int64), self._seen_N], device)
        if not bool((seen_N == 1).all()):
            raise RuntimeError("an example was not evaluated exactly once")
        self._values_N = bits_N.cpu().view(torch.float64)

    def metrics(self) -> dict[str, float]:
        """Return the metrics over all examples, after `gather`."""
        return dict(task_metrics(np.asarray(self._labels_N), self._values_N.numpy(), self._classes))

    def correct_examples(self) -> str | None:
        """Return which examples have the right class, after `gather`: a bit for each in hexadecimal digits.

        The first example is the highest bit of the first digit; zeros fill the last byte. None for a regression.
        """
        if not self._classes:
            return None
        return np.packbits(self._values_N.numpy() == np.asarray(self._labels_N)).tobytes().hex()
