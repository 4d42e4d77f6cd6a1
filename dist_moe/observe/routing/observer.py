"""Observes the routing of single steps: of those that are traced, and of those whose distributions are drawn.

Shapes: B sequences, S positions, T = B * S tokens, E experts, K experts a token takes.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config
from dist_moe.data.labeled.stream import LabeledBatch
from dist_moe.data.stream import Batch
from dist_moe.moe.records import RouterRecord
from dist_moe.moe.router import Router
from dist_moe.moe.select import gate_scores
from dist_moe.observe.routing.trace import TokensOfBatch, TraceRecorder

MAX_VALUES = 1 << 17
"""Of a distribution: a sample of this size has its shape."""

Distributions = dict[str, NDArray[np.float64]]
Observe = Callable[[Sequence[RouterRecord]], None]


def pictures_are_due(step: int, interval: int, logged_interval: int, last_step: int) -> bool:
    """Return whether the pictures of a run are drawn in a step: a logged one, the first at or after each multiple.

    Args:
        step: The step.
        interval: Steps between pictures; 0: in the last step alone.
        logged_interval: Steps between logged steps.
        last_step: Of the run.
    """
    if step == last_step:
        return True
    return bool(interval) and step % logged_interval == 0 and step % interval < logged_interval


class RoutingObserver:
    """Observes the routing of one rank. Every rank has one; it calls no collective.

    Args:
        config: The configuration of the run.
        mesh: The layout of the ranks.
        routers: Of each MoE layer.
        domains: Names of the domains of the text, by their index.
        steps_done: Optimizer steps before this process.
    """

    def __init__(
        self, config: Config, mesh: Mesh, routers: Sequence[Router], domains: Sequence[str], steps_done: int = 0
    ) -> None:
        observe = config.observe
        self._observe, self._last_step = observe, config.train.steps
        self._routers = routers
        self._draws = mesh.rank == 0 and observe.tensorboard
        self._trace: TraceRecorder | None = None
        if observe.trace_interval:
            folder = Path(config.run.dir)
            self._trace = TraceRecorder(folder, mesh, observe.trace_interval, observe.trace_tokens, domains, steps_done)
        self._traced = False
        self._distributions: Distributions | None = None

    def begin(
        self, step: int, batches: Sequence[Batch | LabeledBatch], sequences: Sequence[Sequence[int]]
    ) -> Observe | None:
        """Begin a step.

        Args:
            step: The step, from 1.
            batches: The micro-batches of this rank.
            sequences: For each micro-batch the numbers of its sequences in the stream of the run.

        Returns:
            To be called with the records of each forward in order; None if the step is not observed.
        """
        observe = self._observe
        draws = self._draws and pictures_are_due(step, observe.picture_interval, observe.interval, self._last_step)
        self._distributions = {} if draws else None
        self._traced = self._trace is not None and self._trace.is_due(step)
        if not (draws or self._traced):
            return None
        if self._trace is not None and self._traced:
            self._trace.begin(step)
        remaining = iter(zip(batches, sequences, strict=True))

        def record_forward(records: Sequence[RouterRecord]) -> None:
            batch, numbers = next(remaining)
            if self._distributions == {}:
                self._distributions = distributions(self._routers, records)
            if self._trace is not None and self._traced:
                self._trace.add(tokens_of(batch), numbers, records)

        return record_forward

    def finish(self, step: int, taken: bool) -> Distributions | None:
        """End a step: write its trace.

        Args:
            step: The step.
            taken: Whether it was not skipped.

        Returns:
            Scores and gate weights of all layers by name, if this step's distributions are drawn.
        """
        if self._trace is not None and self._traced:
            self._trace.finish(step, taken)
        found, self._distributions = self._distributions, None
        return found


def tokens_of(batch: Batch | LabeledBatch) -> TokensOfBatch:
    """Return what the trace needs of a micro-batch."""
    if isinstance(batch, LabeledBatch):
        return TokensOfBatch(batch.tokens_BS, batch.mask_BS, None)
    return TokensOfBatch(batch.tokens_BS, batch.documents_BS >= 0, batch.domains_BS)


@torch.no_grad()
def distributions(routers: Sequence[Router], records: Sequence[RouterRecord]) -> Distributions:
    """Sample the scores and the gate weights of one micro-batch, over all layers.

    Args:
        routers: Of each layer.
        records: Of their forward.
    """
    scores, weights = [], []
    for router, record in zip(routers, records, strict=True):
        logits_TE, ids_TK, weights_TK = record.logits_TE, record.ids_TK, record.weights_TK
        if record.mask_T is not None:
            logits_TE, ids_TK, weights_TK = (values[record.mask_T] for values in (logits_TE, ids_TK, weights_TK))
        rows = MAX_VALUES // (len(records) * logits_TE.shape[1]) or 1
        every = max(1, len(logits_TE) // rows)
        scores.append(gate_scores(logits_TE[::every], router.rule.score))
        weights.append(weights_TK[::every][ids_TK[::every] >= 0])
    return {"router_scores": _flat(scores), "gate_weights": _flat(weights)}


def bias_distribution(biases: Iterable[Tensor]) -> Distributions:
    """Return the biases of all layers as one distribution."""
    return {"selection_bias": _flat(biases)}


def _flat(tensors: Iterable[Tensor]) -> NDArray[np.float64]:
    flat = [tensor.detach().reshape(-1).double().cpu().numpy() for tensor in tensors]
    values = np.concatenate(flat) if flat else np.zeros(0)
    return values[np.isfinite(values)]
