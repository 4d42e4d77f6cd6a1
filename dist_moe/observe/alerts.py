"""Warnings about the expert load of a run: experts without tokens, and load that stays uneven."""

from dist_moe.observe.metrics import StepMetrics
from dist_moe.text import counted

# With ten assignments expected, chance leaves an expert empty once in exp(10) = 22,000 counts.
MIN_EXPECTED_ASSIGNMENTS = 10


class LoadAlerts:
    """Checks the load of each logged step, and warns once per problem until the problem has been gone for a step.

    Args:
        limit: MaxVio of one layer above which its load counts as uneven (`observe.max_vio_limit`). Where the sampling
            floor of the layer is higher, the floor is the limit.
        patience: consecutive logged steps above the limit before a warning (`observe.max_vio_patience`).

    Raises:
        ValueError: patience is below 1.
    """

    def __init__(self, limit: float, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience}; it is a number of logged steps, at least 1; use 1 to warn at once")
        self.limit = limit
        self.patience = patience
        self._dead: set[tuple[int, int]] = set()  # (layer, expert)
        self._steps_over: dict[int, int] = {}  # layer -> consecutive logged steps above the limit

    def check(self, metrics: StepMetrics) -> list[str]:
        """Return the new warnings of a logged step, one line each; none for a skipped step."""
        if metrics.skipped:
            return []
        return self._dead_experts(metrics) + self._uneven_layers(metrics)

    def _dead_experts(self, metrics: StepMetrics) -> list[str]:
        warnings = []
        for layer, load in enumerate(metrics.load):
            if sum(load) < MIN_EXPECTED_ASSIGNMENTS * len(load):
                continue
            dead = {(layer, expert) for expert, count in enumerate(load) if count == 0}
            new = sorted(expert for _, expert in dead - self._dead)
            self._dead = {known for known in self._dead if known[0] != layer} | dead
            if new:
                names = ", ".join(map(str, new))
                warnings.append(
                    f"step {metrics.step}: layer {layer}: no tokens for expert{'s'[: len(new) > 1]} {names} "
                    f"(mean load {sum(load) / len(load):.0f})"
                )
        return warnings

    def _uneven_layers(self, metrics: StepMetrics) -> list[str]:
        warnings = []
        values = zip(metrics.max_vio_per_layer, metrics.max_vio_floor_per_layer, strict=True)
        for layer, (value, floor) in enumerate(values):
            over = value > max(self.limit, floor)
            self._steps_over[layer] = self._steps_over.get(layer, 0) + 1 if over else 0
            if self._steps_over[layer] == self.patience:
                warnings.append(
                    f"step {metrics.step}: layer {layer}: MaxVio {value:.2f} (floor {floor:.2f}) is above "
                    f"{max(self.limit, floor):.3g} in {counted(self.patience, 'consecutive logged step')}; "
                    "see balance.policy and balance.rate"
                )
        return warnings
