"""Quantile balancing: its histograms and its quantiles against numpy, and the load that its bias gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.balancing.counts import RoutingCounts
from dist_moe.balancing.load import max_vio
from dist_moe.balancing.margins import BINS, count_margins
from dist_moe.moe.select import TopK, bias_inputs, gate_scores, select_top_k
from dist_moe.policies.quantile import Quantile, quantile_update
from dist_moe.scores import Score


def scores(tokens: int, experts: int, seed: int, spread: float = 1.0) -> Tensor:
    """Logits with an offset for each expert."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + spread * torch.randn(experts, generator=generator)


def numpy_margins(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> np.ndarray:
    """score - the (K+1)-th highest score plus bias of the token."""
    biased_TE = (scores_TE + bias_E).numpy()
    limit_T = np.sort(biased_TE, axis=1)[:, -top_k - 1]
    return scores_TE.numpy() - limit_T[:, None]


@settings(deadline=None)
@given(experts=st.integers(2, 9), tokens=st.integers(0, 40), seed=st.integers(0, 1000), data=st.data())
def test_the_histogram_equals_numpy(experts: int, tokens: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    mask_T = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool)
    scores_TE, bias_E = scores(tokens, experts, seed), scores(1, experts, seed + 1)[0]
    found_EQ = count_margins(scores_TE, bias_E, top_k, mask_T)
    assert found_EQ.dtype == torch.int64 and found_EQ.shape == (experts, BINS)
    margins_TE = numpy_margins(scores_TE, bias_E, top_k)[mask_T.numpy()]
    for expert in range(experts):
        place_T = margins_TE[:, expert] / (1 + np.abs(margins_TE[:, expert]))
        wanted_Q, _ = np.histogram(place_T, bins=BINS, range=(-1, 1))
        # A margin of exactly 0 is on an edge, and rounding may move it to either side.
        assert np.abs(np.cumsum(found_EQ[expert].numpy()) - np.cumsum(wanted_Q)).max() <= (place_T == 0).sum() + 1
        assert int(found_EQ[expert].sum()) == int(mask_T.sum())


@settings(deadline=None)
@given(experts=st.integers(2, 9), seed=st.integers(0, 1000), data=st.data())
def test_the_quantile_equals_numpy_within_a_bin(experts: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    scores_TE, bias_E = scores(500, experts, seed), torch.zeros(experts)
    found_E = quantile_update(bias_E, count_margins(scores_TE, bias_E, top_k), top_k / experts, center=False)
    margins_TE = numpy_margins(scores_TE, bias_E, top_k)
    for expert, found in enumerate(found_E.tolist()):
        # Between the neighbours in order of the exact quantile, and one bin further.
        low, high = np.quantile(
            margins_TE[:, expert], [max(0, 1 - top_k / experts - 0.003), min(1, 1 - top_k / experts + 0.003)]
        )
        width = 3 / BINS * (1 + abs(low)) ** 2 + 3 / BINS * (1 + abs(high)) ** 2
        assert low - width <= -found <= high + width


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6)])
def test_a_few_updates_balance_the_load_of_fixed_tokens(score: Score, experts: int, top_k: int) -> None:
    logits_TE, bias_E = scores(8192, experts, seed=3), torch.zeros(experts)
    rule = TopK(top_k, score)
    space_TE = logits_TE if score == "softmax" else gate_scores(logits_TE, score)
    seen = []
    for _ in range(8):
        ids_TK = select_top_k(logits_TE, rule, *bias_inputs(rule, bias_E)).ids_TK
        seen.append(float(max_vio(ids_TK.flatten().bincount(minlength=experts))))
        bias_E = quantile_update(bias_E, count_margins(space_TE, bias_E, top_k), top_k / experts)
    assert seen[0] > 1.0 and seen[-1] < 0.1, seen
    assert float(bias_E.mean()) == pytest.approx(0.0, abs=1e-5)


def test_an_even_load_of_equal_experts_is_a_fixed_point() -> None:
    """Each expert has the same margins and so the same bias, which centering removes."""
    logits_TE = torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)]).repeat(10, 1)
    found_E = quantile_update(torch.zeros(4), count_margins(logits_TE, torch.zeros(4), 1), 0.25)
    assert found_E.tolist() == [0.0] * 4


def test_trap_T11_the_biases_keep_their_mean_over_many_steps() -> None:
    """Without centering it falls with each batch, to where the bins are wide."""
    bias_E = torch.zeros(8)
    for step in range(200):
        logits_TE = torch.randn(512, 8, generator=torch.Generator().manual_seed(step))
        margins_EQ = count_margins(logits_TE, bias_E, 2)
        counts = RoutingCounts(torch.zeros(8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), margins_EQ)
        bias_E = Quantile().next_bias(bias_E, counts, 0.0)
    assert abs(float(bias_E.mean())) < 1e-6


def test_the_sum_of_histograms_is_that_of_all_tokens_and_a_mean_of_quantiles_is_not() -> None:
    scores_TE, bias_E = scores(600, 5, seed=1), torch.zeros(5)
    halves = [scores_TE[:100], 2 * scores_TE[100:]]
    counts = [count_margins(half, bias_E, 2) for half in halves]
    together_E = quantile_update(bias_E, count_margins(torch.cat(halves), bias_E, 2), 0.4)
    assert torch.equal(quantile_update(bias_E, counts[0] + counts[1], 0.4), together_E)
    mean_E = torch.stack([quantile_update(bias_E, count_EQ, 0.4) for count_EQ in counts]).mean(dim=0)
    assert (mean_E - together_E).abs().max() > 0.05


def test_without_tokens_the_bias_is_unchanged() -> None:
    bias_E = torch.tensor([0.25, -0.25])
    assert torch.equal(quantile_update(bias_E, torch.zeros(2, BINS, dtype=torch.int64), 0.5), bias_E)


def test_top_k_of_all_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=3 of 3 experts"):
        count_margins(torch.zeros(4, 3), torch.zeros(3), 3)


def test_trap_T05_histograms_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError, match="they are int64 counts"):
        quantile_update(torch.zeros(2), torch.zeros(2, BINS), 0.5)
