"""Counts of a routing: the load, the experts per token, and their sums."""

import torch

from dist_moe.balancing.counts import RoutingCounts, add_counts, all_reduce_routing_counts, count_routing

IDS_TK = torch.tensor([[0, 2], [2, -1], [-1, -1], [2, 1]])  # the third token is padding


def test_counts_by_hand() -> None:
    layer_counts = count_routing(IDS_TK, experts=4, max_experts_per_token=3)
    assert layer_counts.load_E.tolist() == [1, 1, 3, 0]
    assert layer_counts.k_histogram_K.tolist() == [1, 2, 0], "one token took 1, two took 2, none took 3"
    assert {count.dtype for count in layer_counts if isinstance(count, torch.Tensor)} == {torch.int64}


def test_sums_over_micro_batches_and_layers() -> None:
    layer_counts = count_routing(IDS_TK, experts=4, max_experts_per_token=3)
    with_margins = layer_counts._replace(margins_EQ=torch.ones(4, 5, dtype=torch.int64))
    added = add_counts([layer_counts, with_margins], [layer_counts, with_margins])
    summed = all_reduce_routing_counts(added, torch.device("cpu"))
    for one in (*added, *summed):
        assert (one.load_E.tolist(), one.k_histogram_K.tolist()) == ([2, 2, 6, 0], [2, 4, 0])
    assert added[0].margins_EQ is None and summed[0].margins_EQ is None
    assert summed[1].margins_EQ is not None and summed[1].margins_EQ.tolist() == [[2] * 5] * 4


def test_without_routed_tokens_all_counts_are_zero() -> None:
    layer_counts = count_routing(torch.full((3, 1), -1), experts=2, max_experts_per_token=2)
    assert (
        layer_counts == RoutingCounts(layer_counts.load_E, layer_counts.k_histogram_K)
        and not layer_counts.load_E.any()
        and not layer_counts.k_histogram_K.any()
    )
