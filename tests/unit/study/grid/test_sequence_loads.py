"""Tests of what is computed from the routing of sequences and domains, with values that were computed by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_moe.balancing.load import max_vio
from dist_moe.data.corpus import prepare
from dist_moe.data.stream import Stream
from dist_moe.study.grid.sequence_loads import (
    SequenceLoads,
    computation_batches,
    documents_of,
    domain_information,
    information_by_chance,
)


def test_computation_batches_join_each_sequence_once() -> None:
    load_NLE = torch.randint(1, 50, (64, 2, 4), generator=torch.Generator().manual_seed(0))
    found = computation_batches(load_NLE, sequences_per_forward=4)
    assert [(row["ranks"], row["batches"]) for row in found] == [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)]
    whole = float(max_vio(load_NLE.sum(dim=0)).mean())
    assert found[-1]["max_vio"] == pytest.approx(whole, abs=1e-4), "one batch of all sequences"
    values = [row["max_vio"] for row in found]
    assert values == sorted(values, reverse=True) and values[0] > 2 * values[-1], "random loads average out"
    assert [row["max_vio_floor"] for row in found] == sorted((row["max_vio_floor"] for row in found), reverse=True)


def test_the_imbalance_of_all_sequences_remains_in_every_batch() -> None:
    load_NLE = torch.tensor([[[3, 1, 1, 1]]]).expand(16, 1, 4).contiguous()
    assert {row["max_vio"] for row in computation_batches(load_NLE, 1)} == {1.0}, "3 / 1.5 - 1"


def test_the_domain_information_is_zero_where_domains_use_the_experts_alike() -> None:
    bits, floor = domain_information(torch.tensor([[30, 10], [300, 100]]))
    # The harmonic mean of 40 and 400 assignments, times 2 domains, is 145.45; (2-1)(2-1) / (2 * 145.45 * ln 2).
    assert bits == pytest.approx(0.0, abs=1e-12) and floor == pytest.approx(0.00496, abs=1e-5)


def test_trap_T92_the_domain_information_counts_domains_equally() -> None:
    assert domain_information(torch.tensor([[7, 0, 0, 0], [0, 90, 0, 0], [0, 0, 5, 5]]))[0] == pytest.approx(
        math.log2(3)
    )


def test_an_absent_domain_does_not_count() -> None:
    with_absent = domain_information(torch.tensor([[7, 1], [1, 7], [0, 0]]))
    assert with_absent == domain_information(torch.tensor([[7, 1], [1, 7]]))
    assert domain_information(torch.tensor([[7, 1], [0, 0]])) == (0.0, 0.0)


def test_each_position_belongs_to_its_document(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": "a" * (3 + number % 9), "domain": f"d{number % 3}"} for number in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = prepare([str(path)], "bytes", 300, 0.5, tmp_path)
    stream = Stream(data.validation, 16, seed=0)
    count = 16 * (stream.rows_per_epoch + 1)
    document_T = documents_of(data.validation, 0, count)
    domain_T = stream.rows_in_file_order(0, stream.rows_per_epoch + 1).domains_BS.flatten()
    padding_T = domain_T < 0
    assert padding_T.any() and (document_T[padding_T] == -1).all() and (document_T[~padding_T] >= 0).all()
    assert torch.equal(
        torch.from_numpy(np.array(data.validation.domains_N))[document_T[~padding_T]], domain_T[~padding_T]
    )
    assert len(document_T[~padding_T].unique()) == len(data.validation.domains_N)
    assert torch.equal(documents_of(data.validation, 32, 16), document_T[32:48])


def counted(load_CE: list[list[int]], domain_C: list[int]) -> SequenceLoads:
    load_CLE = torch.tensor(load_CE)[:, None]
    return SequenceLoads(load_CLE, load_CLE, load_CLE.sum(dim=(1, 2)), torch.tensor(domain_C), ("a", "b"))


def test_the_load_of_a_domain_is_that_of_its_documents() -> None:
    loads = counted([[4, 0], [0, 2], [1, 1], [0, 0]], [0, 1, 0, 1])
    assert loads.load_LDE().tolist() == [[[5, 1], [0, 2]]]
    assert (loads.tokens_D.tolist(), loads.documents_D.tolist()) == ([6, 2], [2, 1])


def test_documents_of_few_words_have_information_by_chance() -> None:
    """Each document uses one expert: the domains of two documents each tell much, whichever they are."""
    few = counted([[9, 0], [0, 9], [9, 0], [0, 9]], [0, 0, 1, 1])
    assert domain_information(few.load_LDE()[0])[0] == pytest.approx(0.0, abs=1e-12)
    # Of the 6 ways to give two of the four documents to the first domain, 2 separate the experts: 1 bit.
    assert information_by_chance(few)[0] == pytest.approx(1 / 3, abs=0.1)
    many = counted([[9, 0], [0, 9]] * 100, [0, 1] * 100)
    assert information_by_chance(many)[0] < 0.05
    assert domain_information(many.load_LDE()[0])[0] == pytest.approx(1.0)
