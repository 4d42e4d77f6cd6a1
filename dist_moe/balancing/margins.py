"""Histograms of the margins by which tokens choose experts: integers, so that sums over ranks are exact.

Shapes: T tokens, E experts, K experts a token takes.
"""

import torch
from torch import Tensor

from dist_moe.balancing.counts import count_values

BINS = 1000


def count_margins(scores_TE: Tensor, bias_E: Tensor, top_k: int | None, mask_T: Tensor | None = None) -> Tensor:
    """Count the margins m = score - (K+1)-th highest biased score of the token, for each expert.

    Expert i is taken where m_i + b_i is above 0. With a threshold for each expert this holds of the score itself.

    The bins divide m / (1 + |m|) evenly, which maps every number into -1..1 in order: no range has to be known, and
    close to 0 a bin is 0.002 wide.

    Args:
        scores_TE: What the bias is added to, scores or logits, unbiased.
        bias_E: [E], the selection bias.
        top_k: K, below E; None with a threshold for each expert, for which the margins are the scores.
        mask_T: bool, the tokens that count; None means all.

    Returns:
        [E, BINS] int64.

    Raises:
        ValueError: `top_k` is not between 1 and E - 1.
    """
    experts = scores_TE.shape[-1]
    margin_TE = scores_TE
    if top_k is not None:
        if not 1 <= top_k < experts:
            raise ValueError(f"top_k={top_k} of {experts} experts; the limit is that of one more, so use 1 to E - 1")
        margin_TE = scores_TE - (scores_TE + bias_E).topk(top_k + 1, dim=-1).values[:, -1:]
    place_TE = margin_TE / (1 + margin_TE.abs())
    bin_TE = ((place_TE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    cell_TE = bin_TE + BINS * torch.arange(experts, device=scores_TE.device)
    cells = experts * BINS
    if mask_T is not None:
        cell_TE = cell_TE.masked_fill(~mask_T.unsqueeze(1), cells)  # one more, which is left out
    return count_values(cell_TE.reshape(-1), cells + 1)[:cells].view(experts, BINS)
