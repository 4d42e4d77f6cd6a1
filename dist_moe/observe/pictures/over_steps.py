"""The load of a run over its steps, in bounded memory.

Shapes: L MoE layers, E routed experts of a layer, C columns.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dist_moe.policies.shares import Shares, TargetShares, equal_shares

MAX_COLUMNS = 256


def targets_of(load: NDArray[np.float64], shares: Shares) -> NDArray[np.float64]:
    """Return the target load of each expert, [..., E] -> [..., E]: the mean load, or that of the target shares."""
    mean = load.mean(axis=-1, keepdims=True)
    of_each = np.ones(load.shape[-1]) if shares is None else np.asarray(shares) * load.shape[-1]
    return mean * of_each


class LoadOverSteps:
    """Columns of counts, each of one or more logged steps. When the columns are full, neighbors are added.

    A run of any length has at most `max_columns` columns of 8 bytes for each expert: 30 MB for 60 layers of
    256 experts.

    Args:
        max_columns: An even number.
        target_shares: The target shares of the experts of a layer.
    """

    def __init__(self, max_columns: int = MAX_COLUMNS, target_shares: TargetShares = equal_shares) -> None:
        if max_columns < 2 or max_columns % 2:
            raise ValueError(f"max_columns={max_columns}; neighbors are added in pairs; use an even number from 2")
        self._max_columns, self.target_shares = max_columns, target_shares
        self._steps_per_column, self._in_last = 1, 0
        # [columns, experts of all layers]; rows after the last column are unused.
        self._counts = np.zeros((max_columns, 0), dtype=np.int64)
        self._experts: tuple[int, ...] = ()
        self.steps: list[int] = []
        """The last step of each column."""

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self.steps)

    @property
    def layers(self) -> int:
        """The number of MoE layers."""
        return len(self._experts)

    @property
    def has_targets(self) -> bool:
        """Whether the experts have target shares, so that loads are relative to these instead of the mean."""
        return any(self.target_shares(experts) is not None for experts in self._experts)

    def add(self, step: int, load: Sequence[Sequence[int]]) -> None:
        """Add a logged step.

        Args:
            step: The step, above all before it.
            load: [L][E] assignments; layers may differ in E.

        Raises:
            ValueError: The layers or experts are not those of the steps before.
        """
        experts = tuple(map(len, load))
        if not self.steps:
            self._experts, self._counts = experts, np.zeros((self._max_columns, sum(experts)), dtype=np.int64)
        elif experts != self._experts:
            raise ValueError(
                f"step {step} has layers of {experts} experts, and the steps before it {self._experts}; "
                "add the steps of one model"
            )
        if not self.steps or self._in_last == self._steps_per_column:
            self._begin_column()
        self._counts[len(self.steps) - 1] += np.array([count for row in load for count in row], dtype=np.int64)
        self.steps[-1] = step
        self._in_last += 1

    def _begin_column(self) -> None:
        if len(self.steps) == self._max_columns:
            half = self._max_columns // 2
            self._counts[:half] = self._counts[::2] + self._counts[1::2]
            self._counts[half:] = 0
            self.steps = self.steps[1::2]
            self._steps_per_column *= 2
        self.steps.append(0)
        self._in_last = 0

    def ratio_EC(self, layer: int) -> NDArray[np.float64]:
        """Return load / target load of each expert of a layer, [E, C]; NaN where no token was routed."""
        first = sum(self._experts[:layer])
        load_CE = self._counts[: len(self), first : first + self._experts[layer]].astype(np.float64)
        target_CE = targets_of(load_CE, self.target_shares(load_CE.shape[1]))
        target_CE[target_CE == 0] = np.nan
        return (load_CE / target_CE).T

    def largest_LC(self) -> NDArray[np.float64]:
        """Return the largest load / target load of each layer, which is MaxVio + 1, [L, C]."""
        return np.stack([self.ratio_EC(layer).max(axis=0) for layer in range(self.layers)])

    def least_balanced_layers(self, count: int) -> list[int]:
        """Return the layers with the largest mean of MaxVio in the last quarter of the columns, the largest first."""
        recent_LC = np.nan_to_num(self.largest_LC()[:, -max(1, len(self) // 4) :])
        return np.argsort(-recent_LC.mean(axis=1), kind="stable")[:count].tolist()
