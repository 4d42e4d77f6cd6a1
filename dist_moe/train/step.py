"""One training step, whole: read this first.

A step is one optimizer step over the global batch: `accumulation` micro-batches on each worker.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.balancing.balancer import Balancer
from dist_moe.balancing.counts import RoutingCounts
from dist_moe.comm.reduce import all_reduce_counts
from dist_moe.engine.deepspeed import Engine
from dist_moe.engine.train_state import RunBatch
from dist_moe.model.inputs import model_inputs
from dist_moe.model.tasks.base import Output
from dist_moe.moe.records import RouterRecord


class GlobalCounts(NamedTuple):
    """Integers of one step, summed over all ranks.

    Attributes:
        label_tokens: Positions of the global batch that have a target; of labeled texts, the texts.
        tokens: Positions of the global batch that are not padding.
        extra: The caller's integers, summed position by position.
    """

    label_tokens: int
    tokens: int
    extra: list[int]


@dataclass(frozen=True)
class StepRecord:
    """The result of one step.

    Attributes:
        taken: False where the step was skipped.
        grad_norm: Global 2-norm of the gradient before clipping.
        nll_sum: fp32 scalar, this rank's sum of -ln p over its label tokens, in nats, or of the losses of its texts.
        auxiliary: fp32 scalar, the routing losses, averaged over this rank's micro-batches; the mean of `auxiliary`
            over the ranks is the contribution of the routing losses to the loss.
        label_tokens: Label tokens of the global batch.
        routing_counts: Counts of each MoE layer over all ranks.
        micro_loads: This rank's own int64 load_E, for each micro-batch a list over the layers.
        threshold: The threshold that routed this step, before its update; None without threshold routing.
        scales: `scale` and `token_scale` of the task in this step.
    """

    taken: bool
    grad_norm: float
    nll_sum: Tensor
    auxiliary: Tensor
    label_tokens: int
    routing_counts: list[RoutingCounts]
    micro_loads: list[list[Tensor]]
    threshold: float | None
    scales: tuple[Tensor, Tensor]

    @property
    def loads(self) -> list[Tensor]:
        """int64 load_E of each MoE layer over all ranks."""
        return [layer_counts.load_E for layer_counts in self.routing_counts]


def train_step(
    engine: Engine,
    balancer: Balancer,
    batches: Sequence[RunBatch],
    learning_rate: float,
    counts: GlobalCounts | None = None,
    observe: Callable[[Sequence[RouterRecord]], None] | None = None,
) -> StepRecord:
    """Run forward and backward over this worker's micro-batches, one optimizer step, and one balancer update.

    The step is routed by the bias from before it. A step whose gradient is not finite on any rank is skipped: no
    weight, moment or bias changes. A collective call.

    Args:
        engine: The engine, started for `len(batches)` micro-batches a step.
        balancer: The balancer of the engine's model.
        batches: This worker's micro-batches of the global batch.
        learning_rate: The learning rate of this step.
        counts: The token counts of the global batch, if the caller has called `reduce_counts` (to sum integers of its
            own in the same all-reduce); None: reduced here.
        observe: Called with the records of the routers after each forward.
    """
    label_tokens, tokens, _ = counts or reduce_counts(batches, engine.device)
    # DeepSpeed divides the loss by the number of micro-batches, and averages the gradients over the ranks. `parts`
    # undoes both: the loss is the mean over the label tokens of the global batch, the routing losses over all tokens.
    parts = engine.mesh.world_size * len(batches)
    scale, token_scale = (
        torch.full((), parts / max(1, count), device=engine.device) for count in (label_tokens, tokens)
    )
    nll_sum, auxiliary = torch.zeros((), device=engine.device), torch.zeros((), device=engine.device)
    micro_loads, threshold = [], balancer.threshold
    result = None
    for batch in batches:
        output = forward(engine, batch, scale, token_scale, keep_records=observe is not None)
        engine.backward(output.loss)
        balancer.observe(output.routing_counts)
        if observe is not None:
            observe(output.records or [])
        nll_sum += output.nll_sum
        auxiliary += output.auxiliary / len(batches)
        micro_loads.append(output.loads)
        result = engine.step(learning_rate)
    if result is None:
        raise RuntimeError(
            f"{len(batches)} micro-batches did not complete a step; the engine was started for another number"
        )
    routing_counts = balancer.step() if result.taken else balancer.discard()
    return StepRecord(
        taken=result.taken,
        grad_norm=result.grad_norm,
        nll_sum=nll_sum,
        auxiliary=auxiliary,
        label_tokens=label_tokens,
        routing_counts=routing_counts,
        micro_loads=micro_loads,
        threshold=threshold,
        scales=(scale, token_scale),
    )


def forward(engine: Engine, batch: RunBatch, scale: Tensor, token_scale: Tensor, keep_records: bool = False) -> Output:
    """Run the engine's module on one micro-batch."""
    output: Output = engine.forward(model_inputs(batch, engine.device), scale, token_scale, keep_records)
    return output


def reduce_counts(batches: Sequence[RunBatch], device: torch.device, extra: Sequence[int] = ()) -> GlobalCounts:
    """Count the labels and tokens of the global batch over all ranks in ONE all-reduce. A collective call.

    Args:
        batches: This worker's micro-batches.
        device: The device of the collective.
        extra: Further integers to sum in the same all-reduce, as many on every rank.
    """
    none = torch.zeros((), dtype=torch.int64)
    labels = sum((batch.label_count for batch in batches), none)
    tokens = sum((batch.token_count for batch in batches), none)
    counts = all_reduce_counts([labels, tokens, torch.tensor(extra, dtype=torch.int64)], device)
    return GlobalCounts(int(counts[0]), int(counts[1]), counts[2].tolist())
