"""One training step, whole: read this first.

A step is one optimizer step over the global batch: `accumulation` micro-batches on each of the workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.balance.balancer import Balancer
from dist_moe.comm.reduce import sum_counts
from dist_moe.data.stream import Batch
from dist_moe.model.task import IGNORED, Output
from dist_moe.train.engine import Engine


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind.

    taken: false where it was skipped. grad_norm: global 2-norm before clipping. nll_sum: this rank's sum of -ln p,
    fp32 scalar, nats. labels: label tokens of the global batch. loads: int64 load_E of each layer over all ranks.
    """

    taken: bool
    grad_norm: float
    nll_sum: Tensor
    labels: int
    loads: list[Tensor]


def train_step(engine: Engine, balancer: Balancer, batches: Sequence[Batch], learning_rate: float) -> StepRecord:
    """Forward and backward over this worker's micro-batches, one optimizer step, one update of the balance.

    The bias that routes in this step is the one from before it. A step that is skipped, because its gradient is not
    finite on some rank, moves no weight, no moment and no bias.
    """
    labels = count_labels(batches, engine.device)
    # DeepSpeed divides by the micro-batches and averages over the ranks; this undoes both, so that the loss is the
    # mean over the label tokens of the global batch, however it was divided up.
    scale = torch.tensor(engine.mesh.world_size * len(batches) / max(1, labels), device=engine.device)
    nll_sum = torch.zeros((), device=engine.device)
    result = None
    for batch in batches:
        output = forward(engine, batch, scale)
        engine.backward(output.loss)
        balancer.observe(output.loads)
        nll_sum += output.nll_sum
        result = engine.step(learning_rate)
    if result is None:
        raise RuntimeError(
            f"{len(batches)} micro-batches did not end a step; the engine was started for another number"
        )
    loads = balancer.step() if result.taken else balancer.discard()
    return StepRecord(result.taken, result.grad_norm, nll_sum, labels, loads)


def forward(engine: Engine, batch: Batch, scale: Tensor) -> Output:
    """The module's output for one micro-batch."""
    mask_BS = batch.documents_BS >= 0
    inputs = (batch.tokens_BS, batch.targets_BS, batch.positions_BS, mask_BS)
    return engine.forward(*(tensor.to(engine.device) for tensor in inputs), scale)


def count_labels(batches: Sequence[Batch], device: torch.device) -> int:
    """Label tokens of the global batch: summed over the micro-batches and over all ranks."""
    labels = sum(((batch.targets_BS != IGNORED).sum() for batch in batches), torch.zeros((), dtype=torch.int64))
    return int(sum_counts([labels], device)[0])
