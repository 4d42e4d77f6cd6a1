"""The rules that turn a run's load into warnings: an expert without tokens, a load that stays uneven."""

from dist_moe.observe.metrics import StepMetrics

# With ten assignments expected, chance leaves an expert empty once in exp(10) = 22,000 counts.
MIN_EXPECTED_ASSIGNMENTS = 10


class LoadWatch:
    """Looks at each logged step and says once what is wrong, and again only after it was right in between.

    Args:
        limit: MaxVio of one layer above which its load counts as uneven (`observe.max_vio_limit`). Where
            chance alone gives more than this, the layer's floor is the limit.
        patience: logged steps in a row above the limit before a warning (`observe.max_vio_patience`).

    Raises:
        ValueError: patience is below 1.
    """

    def __init__(self, limit: float, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience}; it counts logged steps, at least 1; use 1 to warn at once")
        self.limit = limit
        self.patience = patience
        self._dead: set[tuple[int, int]] = set()  # (layer, expert)
        self._steps_over: dict[int, int] = {}  # layer -> logged steps in a row

    def step(self, metrics: StepMetrics) -> list[str]:
        """Warnings that this logged step gives rise to, one line each; a skipped step gives none."""
        if metrics.skipped:
            return []
        return self._dead_lines(metrics) + self._uneven_lines(metrics)

    def _dead_lines(self, metrics: StepMetrics) -> list[str]:
        lines = []
        for layer, load in enumerate(metrics.load):
            if sum(load) < MIN_EXPECTED_ASSIGNMENTS * len(load):
                continue
            dead = {(layer, expert) for expert, count in enumerate(load) if count == 0}
            fresh = sorted(expert for _, expert in dead - self._dead)
            self._dead = {known for known in self._dead if known[0] != layer} | dead
            if fresh:
                names = ", ".join(map(str, fresh))
                lines.append(
                    f"step {metrics.step}: layer {layer}: no token for expert{'s'[: len(fresh) > 1]} {names} "
                    f"(the mean is {sum(load) / len(load):.0f})"
                )
        return lines

    def _uneven_lines(self, metrics: StepMetrics) -> list[str]:
        lines = []
        measured = zip(metrics.max_vio_per_layer, metrics.max_vio_floor_per_layer, strict=True)
        for layer, (value, floor) in enumerate(measured):
            over = value > max(self.limit, floor)
            self._steps_over[layer] = self._steps_over.get(layer, 0) + 1 if over else 0
            if self._steps_over[layer] == self.patience:
                lines.append(
                    f"step {metrics.step}: layer {layer}: MaxVio {value:.2f} (floor {floor:.2f}) is above "
                    f"{self.limit:g} for {self.patience} logged step{'s'[: self.patience > 1]} in a row; "
                    "see balance.policy and balance.rate"
                )
        return lines
