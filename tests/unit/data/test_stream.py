"""The stream of rows against a slow reference: the order depends on seed and row alone, and no token is lost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.data.corpus import Corpus
from dist_moe.data.stream import Batch, Stream, permutation

END = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=12), min_size=1, max_size=9)


def _corpus(documents: list[list[int]]) -> Corpus:
    tokens = np.array([token for document in documents for token in [*document, END]], dtype=np.uint16)
    starts_N1 = np.cumsum([0] + [len(document) + 1 for document in documents])
    domains_N = np.arange(len(documents), dtype=np.int64) % 3
    return Corpus(tokens, starts_N1, domains_N, ("a", "b", "c"), END, 0)


def _reference_epoch(documents: list[list[int]], order: list[int], length: int) -> list[list[tuple[int, ...]]]:
    """Rows of (token, target, document, position, domain), one token at a time."""
    flat = [(token, at, place) for place, at in enumerate(order) for token in [*documents[at], END]]
    rows: list[list[tuple[int, ...]]] = []
    for start in range(0, len(flat) - 1, length):
        row: list[tuple[int, ...]] = []
        first_place, position = flat[start][2], 0
        for i in range(start, start + length):
            if i >= len(flat) - 1:
                row.append((END, -100, -1, 0, -1))
                continue
            token, document, place = flat[i]
            position = 0 if i == start or flat[i - 1][2] != place else position + 1
            target = -100 if token == END else flat[i + 1][0]
            row.append((token, target, place - first_place, position, document % 3))
        rows.append(row)
    return rows


def _rows(batch: Batch) -> list[list[tuple[int, ...]]]:
    assert all(column.dtype == torch.int64 for column in batch)
    return [list(zip(*(column[b].tolist() for column in batch), strict=True)) for b in range(len(batch.tokens_BS))]


@given(documents=DOCUMENTS, length=st.integers(2, 20), seed=st.integers(0, 5), data=st.data())
def test_rows_equal_those_of_the_slow_reference(
    documents: list[list[int]], length: int, seed: int, data: st.DataObject
) -> None:
    stream = Stream(_corpus(documents), length, seed)
    endless = []
    for epoch in range(3):
        order = permutation(len(documents), seed, epoch, 0).tolist()
        rows = _reference_epoch(documents, order, length)
        assert len(rows) == stream.rows_per_epoch
        endless += [rows[r] for r in permutation(len(rows), seed, epoch, 1)]
    first = data.draw(st.integers(0, len(endless) - 1))
    count = data.draw(st.integers(1, len(endless) - first))
    assert _rows(stream.batch(first, count)) == endless[first : first + count]


@given(documents=DOCUMENTS, length=st.integers(2, 20))
def test_rows_in_file_order_are_the_file_then_padding(documents: list[list[int]], length: int) -> None:
    stream = Stream(_corpus(documents), length, 3)
    plain = _reference_epoch(documents, list(range(len(documents))), length)
    padding = [(END, -100, -1, 0, -1)] * length
    assert _rows(stream.rows_in_file_order(0, len(plain) + 2)) == [*plain, padding, padding]
    assert _rows(stream.rows_in_file_order(1, 1)) == [*plain, padding][1:2]


@given(documents=DOCUMENTS, length=st.integers(2, 20), seed=st.integers(0, 5))
def test_every_token_has_its_loss_once_an_epoch(documents: list[list[int]], length: int, seed: int) -> None:
    stream = Stream(_corpus(documents), length, seed)
    for epoch in range(2):
        batch = stream.batch(epoch * stream.rows_per_epoch, stream.rows_per_epoch)
        pairs = sorted(zip(batch.tokens_BS.flatten().tolist(), batch.targets_BS.flatten().tolist(), strict=True))
        expected = [pair for each in documents for pair in zip(each, [*each[1:], END], strict=True)]
        assert [pair for pair in pairs if pair[1] != -100] == sorted(expected)
        assert ((batch.targets_BS != -100).sum(dim=1) > 0).all()


def test_batches_do_not_depend_on_their_size_or_on_earlier_ones() -> None:
    documents = [[i] * (i % 7 + 1) for i in range(60)]
    whole = Stream(_corpus(documents), 8, 1).batch(0, 64)
    pieces = Stream(_corpus(documents), 8, 1)
    for first in (60, 0, 32, 4):  # in any order, across epochs
        piece = pieces.batch(first, 4)
        assert all(torch.equal(a, b[first : first + 4]) for a, b in zip(piece, whole, strict=True))


def test_epochs_and_seeds_differ() -> None:
    corpus = _corpus([[i] * (i % 7 + 1) for i in range(60)])
    stream = Stream(corpus, 8, 1)
    size = stream.rows_per_epoch
    first, second = stream.batch(0, size), stream.batch(size, size)
    other = Stream(corpus, 8, 2).batch(0, size)
    assert not torch.equal(first.tokens_BS, second.tokens_BS)
    assert not torch.equal(first.tokens_BS, other.tokens_BS)
    # Documents are shuffled again, too: the same rows in another order would have equal sums.
    assert not torch.equal(first.tokens_BS.sum(1).sort().values, second.tokens_BS.sum(1).sort().values)


def test_permutation_does_not_change_between_versions() -> None:
    assert permutation(10, 1, 2, 0).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
    assert permutation(10, 1, 3, 0).tolist() == [0, 5, 1, 9, 2, 6, 7, 8, 4, 3]
    assert sorted(permutation(1000, 7).tolist()) == list(range(1000))


@pytest.mark.parametrize(("length", "seed"), [(1, 0), (0, 0), (8, -1)])
def test_bad_stream_is_refused(length: int, seed: int) -> None:
    with pytest.raises(ValueError, match="lengths start at 2"):
        Stream(_corpus([[1, 2]]), length, seed)


@pytest.mark.parametrize(("first", "rows"), [(-1, 1), (0, 0)])
def test_bad_rows_are_refused(first: int, rows: int) -> None:
    stream = Stream(_corpus([[1, 2]]), 2, 0)
    for ask in (stream.batch, stream.rows_in_file_order):
        with pytest.raises(ValueError, match="rows count from 0"):
            ask(first, rows)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_large_corpus_stays_on_disk(tmp_path: Path) -> None:
    documents, tokens_each = 100, 2_000_000
    path = tmp_path / "tokens"
    with path.open("wb") as handle:
        handle.truncate(documents * tokens_each * 2)  # 400 MB of zeros that take no room
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    starts_N1 = np.arange(documents + 1, dtype=np.int64) * tokens_each
    stream = Stream(Corpus(tokens, starts_N1, np.zeros(documents, np.int64), ("a",), END, 0), 512, 0)
    before = _resident_bytes()
    for step in range(5):
        stream.batch(step * 8, 8)
    stream.rows_in_file_order(1000, 8)
    assert _resident_bytes() - before < 100_000_000
