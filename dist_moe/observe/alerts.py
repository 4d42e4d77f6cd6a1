"""Warnings about the expert load of a run: experts without tokens, and load that stays uneven."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dist_moe.observe.metrics import StepMetrics
from dist_moe.policies.shares import TargetShares, equal_shares, target_loads
from dist_moe.text import counted, listed

# With ten assignments expected, chance leaves an expert empty once in exp(10) = 22,000 counts.
MIN_EXPECTED_ASSIGNMENTS = 10
EARLY_STEPS = 100
"""In the first steps of a run the load is uneven under every policy: the routers have learned nothing yet."""
MOST_LISTED = 8
CHOOSE_ANOTHER = "choose another balance.policy (docs/policies.md)"


@dataclass
class _Problem:
    """One kind of problem: since which step it has lasted in each place, and where it was reported."""

    since: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)  # place -> (first step, logged steps)
    reported: set[tuple[int, ...]] = field(default_factory=set)

    def update(self, places: Iterable[tuple[int, ...]], step: int, patience: int) -> list[tuple[int, ...]]:
        """Record where a logged step has the problem -> the places to report: it lasts there, for the first time."""
        present = set(places)
        before, self.since = self.since, {}
        for place in sorted(present):
            first, logged = before.get(place, (step, 0))
            self.since[place] = (first, logged + 1)
        due = [place for place, (_, logged) in self.since.items() if logged >= patience and place not in self.reported]
        self.reported |= set(due)
        return due

    def lasting(self, places: Sequence[tuple[int, ...]], step: int) -> str:
        """Return how long the problem has lasted at least, in words."""
        first = max(self.since[place][0] for place in places)
        return f"from step {first} to {step}" if first < step else f"in step {step}"


class LoadAlerts:
    """Checks the load of each logged step, and warns of a problem that lasts, once for each layer or expert.

    Args:
        limit: MaxVio of one layer above which its load counts as uneven (`observe.max_vio_limit`). Where the sampling
            floor of the layer is higher, the floor is the limit.
        patience: Consecutive logged steps with a problem before a warning (`observe.max_vio_patience`).
        early_steps: First steps of the run that do not count.
        balanced: Whether the run balances at all; there is no warning if it does not.
        has_rate: Whether the policy has a rate that can be raised.
        target_shares: The target shares of the experts of a layer.

    Raises:
        ValueError: patience is below 1.
    """

    def __init__(
        self,
        limit: float,
        patience: int,
        early_steps: int = EARLY_STEPS,
        balanced: bool = True,
        has_rate: bool = True,
        target_shares: TargetShares = equal_shares,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience}; it is a number of logged steps, at least 1; use 1 to warn at once")
        self.limit = limit
        self.patience = patience
        self.early_steps, self.balanced = early_steps, balanced
        self._remedy = f"raise balance.rate, or {CHOOSE_ANOTHER}" if has_rate else CHOOSE_ANOTHER
        self._target_shares = target_shares
        self._dead, self._uneven = _Problem(), _Problem()

    def check(self, metrics: StepMetrics) -> list[str]:
        """Return the new warnings of a logged step, one line each; none for a skipped or an early step."""
        if metrics.skipped or not self.balanced or metrics.step <= self.early_steps:
            return []
        return [*self._dead_experts(metrics), *self._uneven_layers(metrics)]

    def _dead_experts(self, metrics: StepMetrics) -> list[str]:
        dead = [
            (layer, expert)
            for layer, load in enumerate(metrics.load)
            for expert, target in enumerate(target_loads(load, self._target_shares(len(load))))
            if target >= MIN_EXPECTED_ASSIGNMENTS and load[expert] == 0
        ]
        due = self._dead.update(dead, metrics.step, self.patience)
        if not due:
            return []
        names = listed((f"{expert} of layer {layer}" for layer, expert in due), last="and", most=MOST_LISTED)
        return [f"no tokens for expert {names} {self._dead.lasting(due, metrics.step)}; {self._remedy}"]

    def _uneven_layers(self, metrics: StepMetrics) -> list[str]:
        values = list(zip(metrics.max_vio_per_layer, metrics.max_vio_floor_per_layer, strict=True))
        over = [(layer,) for layer, (value, floor) in enumerate(values) if value > max(self.limit, floor)]
        due = self._uneven.update(over, metrics.step, self.patience)
        if not due:
            return []
        worst = max((layer for (layer,) in due), key=lambda layer: values[layer][0])
        value, floor = values[worst]
        names = listed((layer for (layer,) in due), last="and", most=MOST_LISTED)
        return [
            f"load of layer{'s'[: len(due) > 1]} {names} is uneven {self._uneven.lasting(due, metrics.step)} "
            f"({counted(self.patience, 'logged step')}): MaxVio {value:.2f} in layer {worst} (floor {floor:.2f}), "
            f"above {max(self.limit, floor):.3g}; {self._remedy}"
        ]
