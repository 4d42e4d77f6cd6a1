"""Quantile balancing: the bias with which each expert would have received its share of the last batch.

A token takes an expert whose score plus bias is above the (K+1)-th highest of its biased scores. With the margin
m_i = score_i - that threshold, expert i is taken where m_i > -b_i; so the share K/E of the tokens is taken by
b_i = -quantile_{1 - K/E}(m_i). There is no rate. Across ranks the margins are counted in histograms, whose sum is
exact; a mean of local quantiles would be another number.

Source: J. Su, "MoE travelogue 6: optimal allocation", 2026, kexue.fm/archives/11619, where it follows
from an allocation problem. The histogram is ours (`dist_moe.balancing.margins`).

Shapes: E experts, K experts a token takes, Q bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dist_moe.errors import Violation
from dist_moe.policies.base import LayerCounts, Refusal, RoutingValues, SharesPolicy
from dist_moe.policies.load_error import centered
from dist_moe.text import counted, up_to

if TYPE_CHECKING:
    from torch import Tensor


class QuantilePolicy(SharesPolicy):
    """A policy that reads its bias off quantiles of the margins, without a rate."""

    needs_margins: ClassVar[bool] = True

    @classmethod
    def refusal(cls, selection: str, score: str) -> Refusal | None:
        """Refuse threshold routing, in which the number of experts of a token is not given."""
        if selection != "threshold":
            return None
        return Refusal(
            "finds the bias with which each expert gets K of E tokens, and threshold routing has no K",
            "use another balance.policy, or router.selection=top_k",
        )

    def violations(self, routing: RoutingValues) -> list[Violation]:
        """Refuse what the margins do not describe: a token that takes all experts, groups, and drifting biases."""
        violations = super().violations(routing)
        if routing.selection != "threshold" and routing.top_k == routing.experts:
            rule = f"gives each token all {counted(routing.experts, 'expert')}, so there is nothing to balance"
            remedy = f"use {up_to(routing.experts - 1)}, or another balance.policy"
            violations.append(Violation("router.top_k", routing.top_k, rule, remedy))
        if routing.selection != "threshold" and routing.groups != 1:
            rule = f"excludes groups of experts for a token, which balance.policy={self.policy} does not support"
            violations.append(
                Violation("router.groups", routing.groups, rule, "set it to 1, or use another balance.policy")
            )
        if self.center is False and self.center_by_default:
            rule = f"lets the biases of balance.policy={self.policy} drift until their histograms lose resolution"
            violations.append(Violation("balance.center", False, rule, "leave it out"))
        return violations

    def balancing_bias(self, bias_E: Tensor, counts: LayerCounts) -> Tensor:
        """The bias that would have balanced the last optimizer step; see `quantile_update`."""
        if counts.margins_EQ is None:
            raise RuntimeError(f"balance.policy={self.policy} needs margins; the task was built for another policy")
        experts, top_k = bias_E.numel(), counts.top_k or counts.k_histogram_K.numel()
        shares = self.target_shares(experts)
        share = top_k / experts if shares is None else [top_k * share for share in shares]
        return quantile_update(bias_E, counts.margins_EQ, share, self.centers)


class Quantile(QuantilePolicy):
    """The bias that would have balanced the last optimizer step."""

    policy: Literal["quantile"] = Field(
        default="quantile", description="the bias that would have balanced the last step; kexue.fm/archives/11619"
    )

    def next_bias(self, bias_E: Tensor, counts: LayerCounts, rate: float) -> Tensor:
        """The next selection bias; see `quantile_update`."""
        return self.balancing_bias(bias_E, counts)


def quantile_update(bias_E: Tensor, margins_EQ: Tensor, share: float | Sequence[float], center: bool = True) -> Tensor:
    """Compute the next bias, -quantile_{1 - share} of the margins of each expert.

    Within a bin the margins are taken to be evenly spread.

    Args:
        bias_E: [E] fp32, the current bias, returned as a copy if nothing was counted.
        margins_EQ: [E, Q] int64, histograms summed over micro-batches and ALL ranks.
        share: The share of the tokens that each expert is to take, K / E, or a number for each expert.
        center: Subtract the mean, which changes no selection. Without it the mean drifts step by step, to where
            the bins are wide.

    Returns:
        [E] fp32, a new tensor.

    Raises:
        TypeError: The counts are not int64.
        ValueError: `share` is not between 0 and 1.
    """
    import torch

    if margins_EQ.dtype != torch.int64:
        raise TypeError(f"margins are {margins_EQ.dtype}; they are int64 counts")
    shares = [share] if isinstance(share, (int, float)) else share
    if not 0 < min(shares) <= max(shares) < 1:
        raise ValueError(f"share={share}; it is a share of the tokens, between 0 and 1")
    share_E = torch.tensor(shares, dtype=torch.float64, device=margins_EQ.device)
    cumulative_EQ = margins_EQ.cumsum(dim=-1).double()
    total_E = cumulative_EQ[:, -1]
    if not bool((total_E > 0).all()):
        return bias_E.clone()
    rank_E1 = ((1 - share_E) * total_E).unsqueeze(-1)
    bin_E1 = torch.searchsorted(cumulative_EQ, rank_E1).clamp(max=margins_EQ.shape[-1] - 1)
    inside_E1 = margins_EQ.gather(1, bin_E1).double()
    below_E1 = cumulative_EQ.gather(1, bin_E1) - inside_E1
    position_E1 = bin_E1 + (rank_E1 - below_E1) / inside_E1.clamp(min=1)
    # The inverse of the map of `count_margins`, m / (1 + |m|).
    place_E = (position_E1 / (margins_EQ.shape[-1] / 2) - 1).squeeze(-1)
    margin_E = place_E / (1 - place_E.abs()).clamp(min=1e-9)
    return centered((-margin_E).to(torch.float32), center)
