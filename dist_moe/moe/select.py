"""Pure selection: routing logits in, experts and mixture weights out.

Shapes: T tokens, E experts, K experts a token takes, G groups of experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_moe.moe.records import Routing

Score = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class TopK:
    """The rule of top-K routing.

    top_k: experts a token takes. score: the gate function. normalise: divide a token's weights by their sum.
    scaling: factor on the weights. groups, top_groups: DeepSeek-V3's group-limited selection; groups=1 is none.
    """

    top_k: int
    score: Score
    normalise: bool = False
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1


def gate_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """The gate function, in fp32 or wider: sigmoid of each logit, or softmax over the experts -> scores_TE."""
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(dim=-1)


def select_top_k(
    logits_TE: Tensor,
    rule: TopK,
    score_bias_E: Tensor | None = None,
    logit_bias_E: Tensor | None = None,
) -> Routing:
    """Select the experts of each token by biased scores and weigh them by the unbiased ones.

    logits_TE: fp32 or wider. score_bias_E is added after the gate function (Loss-Free Balancing on sigmoid scores:
    Wang et al. 2024, arXiv 2408.15664, equation 3), logit_bias_E before it (any bias on softmax scores). Both shape
    the selection alone: they have no gradient and never reach the weights.
    """
    scores_TE = gate_scores(logits_TE, rule.score)
    with torch.no_grad():
        choice_TE = scores_TE.detach()
        if logit_bias_E is not None:
            choice_TE = gate_scores(logits_TE.detach() + logit_bias_E, rule.score)
        if score_bias_E is not None:
            choice_TE = choice_TE + score_bias_E
        if rule.groups > 1:
            choice_TE = _keep_top_groups(choice_TE, rule.groups, rule.top_groups)
        ids_TK = choice_TE.topk(rule.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.normalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(ids_TK, weights_TK * rule.scaling)


def _keep_top_groups(choice_TE: Tensor, groups: int, top_groups: int) -> Tensor:
    """Leave each token the experts of its best groups; a group's score is the sum of its two best (DeepSeek-V3)."""
    choice_TGe = choice_TE.unflatten(1, (groups, -1))
    group_scores_TG = choice_TGe.topk(min(2, choice_TGe.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = group_scores_TG.topk(top_groups, dim=-1).indices
    closed_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept, False)
    return choice_TGe.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).view_as(choice_TE)
