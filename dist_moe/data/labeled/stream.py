"""The endless stream of training examples, in an order that depends on the seed and the row number alone.

Shapes: B rows of a batch, S tokens of the longest of them, N examples.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from dist_moe.data.labeled.prepare import Examples
from dist_moe.data.stream import EPOCHS_KEPT, Rows, permutation


class LabeledBatch(NamedTuple):
    """B rows, one example each, padded to the longest of them.

    Attributes:
        tokens_BS: int64, token ids; the end token at padding.
        mask_BS: bool, false at padding. A row of padding alone is no example, and is not counted.
        types_BS: int64, 1 for tokens of the second text of a pair, else 0.
        labels_B: float64, the index of the class, or the value; 0 in a row of padding.
    """

    tokens_BS: torch.Tensor
    mask_BS: torch.Tensor
    types_BS: torch.Tensor
    labels_B: torch.Tensor

    @property
    def label_count(self) -> torch.Tensor:
        """The number of examples, an int64 scalar."""
        return self.mask_BS.any(dim=1).sum()

    @property
    def token_count(self) -> torch.Tensor:
        """The number of tokens without padding, an int64 scalar."""
        return self.mask_BS.sum()


class ExampleStream:
    """The endless rows of a split: row k is an example of epoch k // N, and each epoch has its own order."""

    def __init__(self, examples: Examples, seed: int) -> None:
        """Make the stream of a split, of which `seed` (0 or more) decides the order."""
        self._examples = examples
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    @property
    def rows_per_epoch(self) -> int:
        """The number of examples (N)."""
        return self._examples.count

    @property
    def labels_N(self) -> np.ndarray:
        """float64 [N], of the examples in the order of the file."""
        return self._examples.labels_N

    @cached_property
    def _lengths_N(self) -> np.ndarray:
        return np.diff(self._examples.starts_N1)

    def batch(self, first_row: int, rows: int) -> LabeledBatch:
        """Return rows first_row to first_row + rows - 1 of the stream."""
        return gather(self._examples, self._numbers(first_row, rows))

    def documents(self, rows: Rows) -> list[int]:
        """Return the indices of the examples of these rows, ascending."""
        return sorted({int(index) for index in self._numbers(rows.first, rows.count)})

    def tokens_before(self, row: int) -> int:
        """Return the number of tokens, without padding, of all rows before this one."""
        epoch, number = divmod(row, self.rows_per_epoch)
        begun = int(self._lengths_N[self._order(epoch)[:number]].sum()) if number else 0
        return epoch * int(self._examples.starts_N1[-1]) + begun

    def rows_in_file_order(self, first_row: int, rows: int) -> LabeledBatch:
        """Return examples in the order of the file, for evaluation; rows past their end are padding."""
        numbers_B = np.arange(first_row, first_row + rows)
        return gather(self._examples, np.where(numbers_B < self.rows_per_epoch, numbers_B, -1))

    def _numbers(self, first_row: int, rows: int) -> np.ndarray:
        if first_row < 0 or rows < 1:
            raise ValueError(f"first_row={first_row}, rows={rows}: rows count from 0, and at least 1 is needed")
        epochs_B, numbers_B = np.divmod(np.arange(first_row, first_row + rows), self.rows_per_epoch)
        pairs = zip(epochs_B, numbers_B, strict=True)
        return np.array([self._order(int(epoch))[number] for epoch, number in pairs], dtype=np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order_N = permutation(self.rows_per_epoch, self._seed, epoch)
            kept = sorted(self._orders.items())[-(EPOCHS_KEPT - 1) :]
            self._orders = {**dict(kept), epoch: order_N}
        return self._orders[epoch]


def gather(examples: Examples, index_B: np.ndarray) -> LabeledBatch:
    """Read the examples with these indices, int64 [B]; -1 is a row of padding."""
    starts_B, ends_B = examples.starts_N1[index_B], examples.starts_N1[index_B + 1]
    lengths_B = np.where(index_B < 0, 0, ends_B - starts_B)
    at_S = np.arange(max(1, int(lengths_B.max())))
    mask_BS = at_S < lengths_B[:, None]
    tokens_BS = examples.tokens[np.where(mask_BS, starts_B[:, None] + at_S, 0)].astype(np.int64)
    columns = (
        np.where(mask_BS, tokens_BS, examples.end_id),
        mask_BS,
        (mask_BS & (at_S >= examples.pair_starts_N[index_B][:, None])).astype(np.int64),
        np.where(index_B < 0, 0.0, examples.labels_N[index_B]),
    )
    return LabeledBatch(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
