"""What is made of a router's record once the model's forward is over: counts for the balancer, and losses."""

import torch
from torch import Tensor

from dist_moe.balance.counts import RoutingCounts, count_routing
from dist_moe.balance.losses import (
    RoutingLosses,
    balance_loss,
    entropy_loss,
    gate_shares,
    load_fractions,
    sequence_balance_loss,
    z_loss,
)
from dist_moe.balance.margins import count_margins
from dist_moe.moe.records import RouterRecord
from dist_moe.moe.router import Router
from dist_moe.moe.select import gate_scores, select
from dist_moe.scores import OVER_LOGITS


@torch.no_grad()
def tally_routing(router: Router, routed: RouterRecord, needs_margins: bool) -> RoutingCounts:
    """The counts of one forward of `router` on this rank."""
    layer_counts = count_routing(routed.ids_TK, router.experts, router.max_experts_per_token)
    if not needs_margins:
        return layer_counts
    # The bias is added to what the margins are measured in: the logits of a softmax, else the scores.
    over_logits = router.rule.score in OVER_LOGITS
    scores_TE = routed.logits_TE if over_logits else gate_scores(routed.logits_TE, router.rule.score)
    margins_EQ = count_margins(scores_TE, router.selection_bias, router.max_experts_per_token, routed.mask_T)
    return layer_counts._replace(margins_EQ=margins_EQ)


def routing_loss(
    losses: RoutingLosses, router: Router, routed: RouterRecord, layer_counts: RoutingCounts, sequences: int
) -> Tensor:
    """The routing losses of one layer, summed over this rank's tokens and weighed by their coefficients."""
    shares_TE = gate_shares(gate_scores(routed.logits_TE, router.rule.score))
    terms = []
    if losses.balance and losses.scope == "sequence":
        terms.append(losses.balance * sequence_balance_loss(shares_TE, unbiased_ids(router, routed), sequences))
    elif losses.balance:
        load_E = layer_counts.load_E if losses.scope == "micro_batch" else router.last_load
        terms.append(losses.balance * balance_loss(shares_TE, load_fractions(load_E), routed.mask_T))
    if losses.z:
        terms.append(losses.z * z_loss(routed.logits_TE, routed.mask_T))
    if losses.entropy:
        terms.append(losses.entropy * entropy_loss(shares_TE, routed.mask_T))
    return torch.stack(terms).sum()


@torch.no_grad()
def unbiased_ids(router: Router, routed: RouterRecord) -> Tensor:
    """ids_TK that the scores alone would have chosen."""
    none_E = torch.zeros_like(router.selection_bias)
    ids_TK = select(routed.logits_TE, router.rule, none_E, router.threshold).ids_TK
    return ids_TK if routed.mask_T is None else ids_TK.masked_fill(~routed.mask_T.unsqueeze(-1), -1)
