"""Tests of what is computed from the routing of sequences and domains, with values that were computed by hand."""

import math

import pytest
import torch

from dist_moe.balance.load import max_vio
from dist_moe.study.grid.sequence_loads import computation_batches, domain_information


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
