"""The load of one optimizer step, over all ranks.

Shapes: L MoE layers, E experts of a layer, K experts a token takes (layers may differ in E and K).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from dist_moe.balancing.counts import RoutingCounts
from dist_moe.balancing.load import dead_experts_floor
from dist_moe.observe.measures import LoadMeasures, mean, measure_load


@dataclass(frozen=True)
class Load:
    """How many assignments each expert received in one optimizer step, over all ranks, exactly.

    Its numbers are read from the device when they are first asked for.

    Attributes:
        step: The number of the step, from 1.
        taken: Whether the weights were updated; the bias is updated only then.
        layers: Names of the layers.
        biases: [E] fp32 of each layer, after the step; None for a layer whose selection has no bias.
        rate: Of the update.
        counts: Of each layer, on the device.
    """

    step: int
    taken: bool
    layers: tuple[str, ...]
    biases: tuple[Tensor | None, ...]
    rate: float
    counts: tuple[RoutingCounts, ...] = field(repr=False)

    @cached_property
    def counts_LE(self) -> tuple[tuple[int, ...], ...]:
        """[L][E], the assignments of each expert."""
        return self._measures.load

    @cached_property
    def tokens(self) -> int:
        """Tokens that the first layer routed."""
        return int(self.counts[0].k_histogram_K.sum())

    @property
    def experts_per_token(self) -> float:
        """Assignments per token, mean over the layers."""
        return mean([_per_token(counts) for counts in self.counts])

    @property
    def max_vio(self) -> float:
        """(largest load - mean load) / mean load, mean over the layers."""
        return mean(self._measures.max_vio_per_layer)

    @property
    def max_vio_floor(self) -> float:
        """The expected `max_vio` if each token chose its experts at random."""
        return mean(self._measures.max_vio_floor_per_layer)

    @property
    def max_vio_per_layer(self) -> tuple[float, ...]:
        """`max_vio` of each layer."""
        return self._measures.max_vio_per_layer

    @property
    def deviation_percent(self) -> float:
        """Standard deviation of the experts' shares of the assignments in percent, mean over the layers."""
        return mean(self._measures.load_deviation_percent_per_layer)

    @property
    def deviation_percent_floor(self) -> float:
        """The expected `deviation_percent` if each token chose its experts at random."""
        return mean(self._measures.load_deviation_percent_floor_per_layer)

    @property
    def dead(self) -> int:
        """Experts without a token, over all layers."""
        return sum(self._measures.dead_experts_per_layer)

    @property
    def dead_floor(self) -> float:
        """The expected `dead` if each token chose its experts at random."""
        return sum(dead_experts_floor(len(counts), sum(counts)) for counts in self.counts_LE)

    def as_dict(self) -> dict[str, Any]:
        """Return the measures, and the counts by layer."""
        names = ("max_vio", "max_vio_floor", "deviation_percent", "deviation_percent_floor", "dead", "dead_floor")
        measures = {name: getattr(self, name) for name in names}
        load = {name: list(counts) for name, counts in zip(self.layers, self.counts_LE, strict=True)}
        tokens = {"tokens": self.tokens, "experts_per_token": self.experts_per_token}
        return {"step": self.step, "taken": self.taken, **tokens, **measures, "load": load}

    @cached_property
    def _measures(self) -> LoadMeasures:
        return measure_load([counts.load_E for counts in self.counts])


def _per_token(counts: RoutingCounts) -> float:
    unrouted = 0 if counts.unrouted is None else int(counts.unrouted)
    return int(counts.load_E.sum()) / max(1, int(counts.k_histogram_K.sum()) + unrouted)
