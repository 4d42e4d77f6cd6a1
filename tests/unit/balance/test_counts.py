"""Counts of a routing: who received, how many each token took, and their sums."""

import torch

from dist_moe.balance.counts import Tally, add_tallies, count_routing, sum_tallies

IDS_TK = torch.tensor([[0, 2], [2, -1], [-1, -1], [2, 1]])  # the third token is padding


def test_a_tally_by_hand() -> None:
    tally = count_routing(IDS_TK, experts=4, most=3)
    assert tally.load_E.tolist() == [1, 1, 3, 0]
    assert tally.takers_K.tolist() == [1, 2, 0], "one token took 1, two took 2, none took 3"
    assert {count.dtype for count in tally if count is not None} == {torch.int64}


def test_sums_over_micro_batches_and_layers() -> None:
    tally = count_routing(IDS_TK, experts=4, most=3)
    with_margins = tally._replace(margins_EQ=torch.ones(4, 5, dtype=torch.int64))
    added = add_tallies([tally, with_margins], [tally, with_margins])
    summed = sum_tallies(added, torch.device("cpu"))
    for one in (*added, *summed):
        assert (one.load_E.tolist(), one.takers_K.tolist()) == ([2, 2, 6, 0], [2, 4, 0])
    assert added[0].margins_EQ is None and summed[0].margins_EQ is None
    assert summed[1].margins_EQ is not None and summed[1].margins_EQ.tolist() == [[2] * 5] * 4


def test_nothing_routed_is_nothing_counted() -> None:
    tally = count_routing(torch.full((3, 1), -1), experts=2, most=2)
    assert tally == Tally(tally.load_E, tally.takers_K) and not tally.load_E.any() and not tally.takers_K.any()
