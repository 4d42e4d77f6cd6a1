"""Quantile balancing: the bias with which each expert would have received its share of the last batch.

A token takes an expert whose score plus bias is above the (K+1)-th highest of its biased scores. With the margin
m_i = score_i - that threshold, expert i is taken where m_i > -b_i; so the share K/E of the tokens is taken by
b_i = -quantile_{1 - K/E}(m_i). There is no rate. Across ranks the margins are counted in histograms, whose sum is
exact; a mean of local quantiles would be another number.

Source: J. Su, "MoE travelogue 6: optimal allocation", 2026, kexue.fm/archives/11619, where it follows
from an allocation problem. The histogram is ours.

Shapes: T tokens, E experts, K experts a token takes, Q bins.
"""

import torch
from torch import Tensor

from dist_moe.balance.load_error import centered

BINS = 1000


def count_margins(scores_TE: Tensor, bias_E: Tensor, top_k: int, mask_T: Tensor | None = None) -> Tensor:
    """The histogram of each expert's margins -> int64 [E, BINS].

    scores_TE: what the bias is added to, scores or logits, unbiased. top_k: K, below E. mask_T: bool, the tokens that
    count; None means all. The bins divide m / (1 + |m|) evenly, which maps every number into -1..1 in order: no range
    has to be known, and close to 0 a bin is 0.002 wide.
    """
    experts = scores_TE.shape[-1]
    if not 1 <= top_k < experts:
        raise ValueError(f"top_k={top_k} of {experts} experts; the threshold is that of one more, so use 1 to E - 1")
    limit_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=-1).values[:, -1:]
    margin_TE = scores_TE - limit_T1
    place_TE = margin_TE / (1 + margin_TE.abs())
    bin_TE = ((place_TE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    cell_TE = bin_TE + BINS * torch.arange(experts, device=scores_TE.device)
    if mask_T is not None:
        cell_TE = cell_TE[mask_T]
    return torch.bincount(cell_TE.reshape(-1), minlength=experts * BINS).view(experts, BINS)


def quantile_update(bias_E: Tensor, margins_EQ: Tensor, share: float, center: bool = True) -> Tensor:
    """The next bias, -quantile_{1 - share}(margins) -> fp32 [E]; the old one where nothing was counted.

    margins_EQ: int64 [E, Q], summed over micro-batches and ALL ranks. share: K / E. Within a bin the margins are taken
    to lie evenly. centre: subtract the mean, which changes no selection now; a mean that drifted step by step would
    carry the margins to where bins are wide. Errors: TypeError for counts that are not int64; ValueError for
    a share outside 0..1.
    """
    if margins_EQ.dtype != torch.int64:
        raise TypeError(f"margins are {margins_EQ.dtype}; they are int64 counts")
    if not 0 < share < 1:
        raise ValueError(f"share={share}; it is K / E, between 0 and 1")
    cumulative_EQ = margins_EQ.cumsum(dim=-1).double()
    total_E = cumulative_EQ[:, -1]
    if not bool((total_E > 0).all()):
        return bias_E.clone()
    rank_E1 = ((1 - share) * total_E).unsqueeze(-1)
    bin_E1 = torch.searchsorted(cumulative_EQ, rank_E1).clamp(max=margins_EQ.shape[-1] - 1)
    inside_E1 = margins_EQ.gather(1, bin_E1).double()
    below_E1 = cumulative_EQ.gather(1, bin_E1) - inside_E1
    position_E1 = bin_E1 + (rank_E1 - below_E1) / inside_E1.clamp(min=1)
    place_E = (position_E1 / (margins_EQ.shape[-1] / 2) - 1).squeeze(-1)
    margin_E = place_E / (1 - place_E.abs()).clamp(min=1e-9)
    return centered((-margin_E).to(torch.float32), center)
