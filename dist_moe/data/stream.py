"""The endless stream of training rows, in an order that depends on the seed and the row number alone.

Shapes: B rows of a batch, S tokens of a row, N documents, R rows of an epoch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from dist_moe.data.corpus import Corpus

IGNORE_INDEX = -100  # the target of a position without loss, as in torch.nn.CrossEntropyLoss
PADDING = -1
# A batch may span two epochs; older orders are not needed again.
EPOCHS_KEPT = 2


class Batch(NamedTuple):
    """B rows of S tokens, all int64 [B, S].

    Attributes:
        tokens_BS: Token ids; the end token at padding.
        targets_BS: The next token; -100 (no loss) at padding, and where the input is an end token, since the next token
            belongs to another document.
        documents_BS: 0, 1, ... within the row; -1 at padding.
        positions_BS: From 0 at the start of the row and of each document in it; 0 at padding.
        domains_BS: Index into Corpus.domains; -1 at padding.
    """

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    documents_BS: torch.Tensor
    positions_BS: torch.Tensor
    domains_BS: torch.Tensor

    @property
    def label_count(self) -> torch.Tensor:
        """The number of positions with a target, an int64 scalar."""
        return (self.targets_BS != IGNORE_INDEX).sum()

    @property
    def token_count(self) -> torch.Tensor:
        """The number of positions that are not padding, an int64 scalar."""
        return (self.documents_BS >= 0).sum()


@dataclass(frozen=True)
class EpochOrder:
    """One pass through the corpus: documents are concatenated in some order, cut into rows, and the rows shuffled.

    Attributes:
        index_N: int64 [N], the document in each slot of the concatenation.
        edges_N1: int64 [N + 1], tokens before each slot.
        rows_R: int64 [R], the number of each row in the concatenation, in the order of the pass.
    """

    index_N: np.ndarray
    edges_N1: np.ndarray
    rows_R: np.ndarray


class Stream:
    """The endless rows of a corpus: row k is number k % R of epoch k // R, and each epoch has its own shuffle of
    documents and rows."""

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int) -> None:
        """Make the stream of a corpus.

        Args:
            corpus: The documents.
            sequence_length: Tokens of a row (S), 2 or more.
            seed: Of the order, 0 or more.

        Raises:
            ValueError: sequence_length is below 2, or seed below 0.
        """
        if sequence_length < 2 or seed < 0:
            raise ValueError(f"sequence_length={sequence_length}, seed={seed}: lengths start at 2, seeds at 0")
        self._corpus = corpus
        self._length = sequence_length
        self._seed = seed
        self._orders: dict[int, EpochOrder] = {}

    @property
    def rows_per_epoch(self) -> int:
        """The number of rows that together hold every token once (R); the last may be padded.

        The last end token of the corpus is no input, as no token follows it.
        """
        return -(-(len(self._corpus.tokens) - 1) // self._length)

    def batch(self, first_row: int, rows: int) -> Batch:
        """Return rows first_row to first_row + rows - 1 of the stream.

        Raises:
            ValueError: first_row is negative, or rows is below 1.
        """
        _check(first_row, rows)
        numbers_B = np.arange(first_row, first_row + rows)
        epochs_B = numbers_B // self.rows_per_epoch
        parts: list[Batch] = []
        for epoch in range(int(epochs_B[0]), int(epochs_B[-1]) + 1):
            order = self._order(epoch)
            numbers_in_epoch = numbers_B[epochs_B == epoch] % self.rows_per_epoch
            parts.append(gather(self._corpus, order, order.rows_R[numbers_in_epoch], self._length))
        return Batch(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def documents(self, rows: "Rows") -> list[int]:
        """Return the indices of the documents that these rows have tokens of, ascending."""
        indices: set[int] = set()
        for number in range(rows.first, rows.first + rows.count):
            order = self._order(number // self.rows_per_epoch)
            begin = int(order.rows_R[number % self.rows_per_epoch]) * self._length
            end = min(begin + self._length, len(self._corpus.tokens) - 1)
            first, last = np.searchsorted(order.edges_N1, [begin, end - 1], side="right") - 1
            indices |= {int(index) for index in order.index_N[first : last + 1]}
        return sorted(indices)

    def tokens_before(self, row: int) -> int:
        """Return the number of positions of all rows before this one."""
        return row * self._length

    def rows_in_file_order(self, first_row: int, rows: int) -> Batch:
        """Return rows of the unshuffled corpus, for evaluation; those past its end are padding.

        Every rank can therefore ask for the same number of rows. Raises ValueError as `batch` does.
        """
        _check(first_row, rows)
        return gather(self._corpus, self._file_order, np.arange(first_row, first_row + rows), self._length)

    @cached_property
    def _file_order(self) -> EpochOrder:
        starts_N1 = self._corpus.starts_N1
        return EpochOrder(np.arange(len(starts_N1) - 1), starts_N1, np.arange(self.rows_per_epoch))

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            starts_N1 = self._corpus.starts_N1
            index_N = permutation(len(starts_N1) - 1, self._seed, epoch, 0)
            edges_N1 = np.concatenate([[0], np.cumsum(np.diff(starts_N1)[index_N])])
            rows_R = permutation(self.rows_per_epoch, self._seed, epoch, 1)
            kept = sorted(self._orders.items())[-(EPOCHS_KEPT - 1) :]
            self._orders = {**dict(kept), epoch: EpochOrder(index_N, edges_N1, rows_R)}
        return self._orders[epoch]


@dataclass(frozen=True)
class Rows:
    """`count` rows of a stream, beginning with number `first`."""

    first: int
    count: int

    @property
    def numbers(self) -> range:
        """The numbers of the rows in the stream."""
        return range(self.first, self.first + self.count)


def permutation(size: int, *key: int) -> np.ndarray:
    """Return the permutation of range(size) that belongs to a key, int64 [size].

    It sorts the raw output of PCG64, which numpy guarantees to keep; numpy's own shuffles may change.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")


def gather(corpus: Corpus, order: EpochOrder, rows_B: np.ndarray, length: int) -> Batch:
    """Read the rows with the numbers rows_B (int64 [B]) in the concatenation; only their tokens are read from disk."""
    last = len(corpus.tokens) - 1  # the stream's last end token is no input
    at_BS = rows_B[:, None] * length + np.arange(length)
    padding_BS = at_BS >= last
    at_BS = np.minimum(at_BS, last - 1)
    slot_BS = np.searchsorted(order.edges_N1, at_BS, side="right") - 1
    index_BS = order.index_N[slot_BS]
    begin_BS = order.edges_N1[slot_BS]
    file_BS = corpus.starts_N1[index_BS] + at_BS - begin_BS
    tokens_BS = corpus.tokens[file_BS].astype(np.int64)
    no_loss_BS = padding_BS | (at_BS + 1 == order.edges_N1[slot_BS + 1])
    next_BS = corpus.tokens[np.where(no_loss_BS, 0, file_BS + 1)].astype(np.int64)
    positions_BS = at_BS - np.maximum(begin_BS, rows_B[:, None] * length)
    columns = (
        np.where(padding_BS, corpus.end_id, tokens_BS),
        np.where(no_loss_BS, IGNORE_INDEX, next_BS),
        np.where(padding_BS, PADDING, slot_BS - slot_BS[:, :1]),
        np.where(padding_BS, 0, positions_BS),
        np.where(padding_BS, PADDING, corpus.domains_N[index_BS]),
    )
    return Batch(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))


def _check(first_row: int, rows: int) -> None:
    if first_row < 0 or rows < 1:
        raise ValueError(f"first_row={first_row}, rows={rows}: rows count from 0, and at least 1 is needed")
