"""One training step, whole: read this first.

A step is one optimizer step over the global batch: `accumulation` micro-batches on each of the workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.balance.balancer import Balancer
from dist_moe.balance.counts import RoutingCounts
from dist_moe.comm.reduce import all_reduce_counts
from dist_moe.data.mmap_files import reject_change
from dist_moe.data.stream import Batch
from dist_moe.engine.deepspeed import Engine
from dist_moe.model.task import IGNORED, Output


@dataclass(frozen=True)
class Word:
    """What a rank tells the others along with its counts.

    asked: it was asked to stop. written: its files of the checkpoint that is being saved are written. changed: what
    has become of a file of the text; "" where all are as they were.
    """

    asked: bool = False
    written: bool = False
    changed: str = ""


NOTHING = Word()


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind.

    taken: false where it was skipped. grad_norm: global 2-norm before clipping. nll_sum: this rank's sum of -ln p,
    fp32 scalar, nats. auxiliary: this rank's mean over its micro-batches of the routing losses, whose mean over the
    ranks is their part of the loss. labels: label tokens of the global batch. tallies: the counts of each layer over
    all ranks. micro_loads: this rank's own int64 load_E, for each micro-batch a list over the layers. threshold: the
    one that routed this step, from before its update; None without threshold routing. scales: `scale` and
    `token_scale` of the task in this step. asked: whether any rank was asked to stop before this step. written:
    whether every rank had written its files.
    """

    taken: bool
    grad_norm: float
    nll_sum: Tensor
    auxiliary: Tensor
    labels: int
    routing_counts: list[RoutingCounts]
    micro_loads: list[list[Tensor]]
    threshold: float | None
    scales: tuple[Tensor, Tensor]
    asked: bool = False
    written: bool = False

    @property
    def loads(self) -> list[Tensor]:
        """int64 load_E of each layer over all ranks."""
        return [layer_counts.load_E for layer_counts in self.routing_counts]


def train_step(
    engine: Engine, balancer: Balancer, batches: Sequence[Batch], learning_rate: float, word: Word = NOTHING
) -> StepRecord:
    """Forward and backward over this worker's micro-batches, one optimizer step, one update of the balance.

    The bias that routes in this step is the one from before it. A step that is skipped, because its gradient is not
    finite on some rank, moves no weight, no moment and no bias. word: what all ranks learn from the record. Errors:
    DataError, on all ranks alike and before anything has moved, where one tells of a changed text.
    """
    labels, tokens, asking, written, changed = count_labels(batches, engine.device, word)
    if changed:
        reject_change(word.changed)
    # DeepSpeed divides by the micro-batches and averages over the ranks; this undoes both, so that the loss is the
    # mean over the label tokens of the global batch, however it was divided up, and the routing losses that over all
    # its tokens.
    parts = engine.mesh.world_size * len(batches)
    scale, token_scale = (torch.tensor(parts / max(1, count), device=engine.device) for count in (labels, tokens))
    nll_sum, auxiliary = torch.zeros((), device=engine.device), torch.zeros((), device=engine.device)
    micro_loads, threshold = [], balancer.threshold
    result = None
    for batch in batches:
        output = forward(engine, batch, scale, token_scale)
        engine.backward(output.loss)
        balancer.observe(output.routing_counts)
        nll_sum += output.nll_sum
        auxiliary += output.auxiliary / len(batches)
        micro_loads.append(output.loads)
        result = engine.step(learning_rate)
    if result is None:
        raise RuntimeError(
            f"{len(batches)} micro-batches did not end a step; the engine was started for another number"
        )
    routing_counts = balancer.step() if result.taken else balancer.discard()
    return StepRecord(
        taken=result.taken,
        grad_norm=result.grad_norm,
        nll_sum=nll_sum,
        auxiliary=auxiliary,
        labels=labels,
        routing_counts=routing_counts,
        micro_loads=micro_loads,
        threshold=threshold,
        scales=(scale, token_scale),
        asked=asking > 0,
        written=written == engine.mesh.world_size,
    )


def forward(engine: Engine, batch: Batch, scale: Tensor, token_scale: Tensor) -> Output:
    """The module's output for one micro-batch."""
    mask_BS = batch.documents_BS >= 0
    inputs = (batch.tokens_BS, batch.targets_BS, batch.positions_BS, mask_BS)
    return engine.forward(*(tensor.to(engine.device) for tensor in inputs), scale, token_scale)


def count_labels(batches: Sequence[Batch], device: torch.device, word: Word = NOTHING) -> tuple[int, ...]:
    """Over all ranks: label and all tokens of the global batch, and how many were asked, have written, saw a change."""
    none = torch.zeros((), dtype=torch.int64)
    labels = sum(((batch.targets_BS != IGNORED).sum() for batch in batches), none)
    tokens = sum(((batch.documents_BS >= 0).sum() for batch in batches), none)
    words = torch.tensor([word.asked, word.written, bool(word.changed)], dtype=torch.int64)
    counts = all_reduce_counts([labels, tokens, words], device)
    return int(counts[0]), int(counts[1]), *counts[2].tolist()
