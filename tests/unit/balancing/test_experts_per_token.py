"""Experts per token: on counts made by hand, and against a slow twin that lists the tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.balancing.experts_per_token import experts_per_token, experts_per_token_percentile, sum_k_histograms

# 5 tokens that took one expert, 3 that took two, none that took three, 2 that took four.
HAND_K = torch.tensor([5, 3, 0, 2])


def test_trap_T19_counts_of_tokens_begin_with_one_expert() -> None:
    assert experts_per_token(HAND_K) == pytest.approx((5 * 1 + 3 * 2 + 2 * 4) / 10)
    found = [experts_per_token_percentile(HAND_K, percent) for percent in (1, 50, 51, 80, 81, 99, 100)]
    assert found == [1, 1, 2, 2, 4, 4, 4]


def test_trap_T19_histograms_of_layers_with_different_k_are_added_elementwise() -> None:
    k_histogram_L = [torch.tensor([5, 3]), HAND_K, torch.tensor([1])]
    assert sum_k_histograms(k_histogram_L).tolist() == [11, 6, 0, 2]
    assert [count.tolist() for count in k_histogram_L] == [[5, 3], [5, 3, 0, 2], [1]], "none is written to"
    assert sum_k_histograms([]).tolist() == []


def test_no_token_has_no_experts() -> None:
    for k_histogram_K in (torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        assert (experts_per_token(k_histogram_K), experts_per_token_percentile(k_histogram_K, 50)) == (0.0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 100))
def test_mean_and_percentile_agree_with_a_slow_twin(counts: list[int], percent: int) -> None:
    k_histogram_K = torch.tensor(counts)
    tokens = [taken for taken, count in enumerate(counts, start=1) for _ in range(count)]
    mean = sum(tokens) / len(tokens) if tokens else 0.0
    place = math.ceil(len(tokens) * percent / 100)
    assert experts_per_token(k_histogram_K) == pytest.approx(mean)
    assert experts_per_token_percentile(k_histogram_K, percent) == (tokens[place - 1] if tokens else 0)


def test_a_percentile_is_exact_to_one_token() -> None:
    half = 2**54
    assert experts_per_token_percentile(torch.tensor([half, half]), 50) == 1
    assert experts_per_token_percentile(torch.tensor([half - 1, half + 1]), 50) == 2, "a float64 loses the 1"


def test_malformed_counts_are_refused() -> None:
    for read in (
        experts_per_token,
        lambda k_histogram_K: experts_per_token_percentile(k_histogram_K, 50),
        lambda t: sum_k_histograms([t]),
    ):
        with pytest.raises(TypeError, match=r"float32; counts are torch\.int64"):
            read(torch.ones(3))
        with pytest.raises(ValueError, match=r"shape \(2, 3\); it is \[K\]"):
            read(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="a count of tokens is -1"):
            read(torch.tensor([2, -1]))
    for percent in (0, 101):
        with pytest.raises(ValueError, match=f"percent={percent}; it is 1 to 100"):
            experts_per_token_percentile(HAND_K, percent)
