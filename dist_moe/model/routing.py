"""Rules of routing under a policy; counts and routing losses from the routers' records after the model's forward."""

from dataclasses import replace

import torch
from torch import Tensor

from dist_moe.balancing.counts import RoutingCounts, count_routing
from dist_moe.balancing.losses import (
    RoutingLosses,
    balance_loss,
    entropy_loss,
    gate_shares,
    load_fractions,
    sequence_balance_loss,
    z_loss,
)
from dist_moe.balancing.margins import count_margins
from dist_moe.moe.records import RouterRecord
from dist_moe.moe.router import Router
from dist_moe.moe.select import ExpertThreshold, Rule, ThresholdRouting, TopK, bias_inputs, gate_scores, select
from dist_moe.policies.base import Policy
from dist_moe.scores import OVER_LOGITS


def with_policy(rule: Rule, policy: Policy) -> Rule:
    """Return a rule that applies the selection bias as a policy does.

    Args:
        rule: As without a policy.
        policy: The policy that moves the bias.
    """
    in_gate_weights = policy.bias_in_gate_weights
    if isinstance(rule, ThresholdRouting):
        return replace(rule, bias_in_gate_weights=in_gate_weights)
    if not isinstance(rule, TopK):
        return rule
    over_probabilities = rule.bias_on_probabilities and not policy.bias_is_log_weight
    return replace(
        rule,
        multiplicative=policy.bias_multiplies_scores and rule.score not in OVER_LOGITS,
        bias_in_gate_weights=in_gate_weights,
        bias_on_probabilities=over_probabilities and not in_gate_weights,
    )


@torch.no_grad()
def count_record(router: Router, record: RouterRecord, needs_margins: bool) -> RoutingCounts:
    """Count one forward of a router on this rank.

    Args:
        router: The router.
        record: The record of the forward.
        needs_margins: Whether to count the margins too (docs/glossary.md, Margin).
    """
    layer_counts = count_routing(record.ids_TK, router.num_experts, router.max_experts_per_token)
    if router.may_take_none:
        tokens = record.ids_TK.new_full((), len(record.ids_TK)) if record.mask_T is None else record.mask_T.sum()
        layer_counts = layer_counts._replace(unrouted=tokens - layer_counts.k_histogram_K.sum())
    if not needs_margins:
        return layer_counts
    # Margins are measured in what the bias is added to: the logits of a softmax or of thresholds, or else the scores.
    thresholds = isinstance(router.rule, ExpertThreshold)
    over_logits = thresholds or bias_inputs(router.rule, router.selection_bias).logit_bias_E is not None
    scores_TE = record.logits_TE if over_logits else gate_scores(record.logits_TE, router.rule.score)
    top_k = None if thresholds else router.max_experts_per_token
    margins_EQ = count_margins(scores_TE, router.selection_bias, top_k, record.mask_T)
    return layer_counts._replace(margins_EQ=margins_EQ)


def routing_loss(
    losses: RoutingLosses, router: Router, record: RouterRecord, layer_counts: RoutingCounts, sequences: int
) -> Tensor:
    """Compute the routing losses of one layer, summed over this rank's tokens and weighted by their coefficients.

    Args:
        losses: The coefficients, at least one of a loss over tokens above 0.
        router: The router of the layer.
        record: Of the forward.
        layer_counts: The counts of the same forward.
        sequences: Number of sequences (B) in the micro-batch.

    Returns:
        A scalar with the graph; 0 without one where no loss is of this layer, as a balance loss of fixed experts.
    """
    shares_TE = gate_shares(gate_scores(record.logits_TE, router.rule.score))
    terms = []
    if losses.balance and not router.is_fixed:
        terms.append(losses.balance * _balance_loss(losses, router, record, layer_counts, shares_TE, sequences))
    if losses.z:
        terms.append(losses.z * z_loss(record.logits_TE, record.mask_T))
    if losses.entropy:
        terms.append(losses.entropy * entropy_loss(shares_TE, record.mask_T))
    return torch.stack(terms).sum() if terms else record.logits_TE.new_zeros(())


def _balance_loss(
    losses: RoutingLosses,
    router: Router,
    record: RouterRecord,
    layer_counts: RoutingCounts,
    shares_TE: Tensor,
    sequences: int,
) -> Tensor:
    if losses.scope == "sequence":
        return sequence_balance_loss(shares_TE, unbiased_ids(router, record), sequences)
    load_E = layer_counts.load_E if losses.scope == "micro_batch" else router.last_load
    return balance_loss(shares_TE, load_fractions(load_E), record.mask_T)


@torch.no_grad()
def unbiased_ids(router: Router, record: RouterRecord) -> Tensor:
    """Return the ids_TK that the scores without a bias select."""
    zero_E = torch.zeros_like(router.selection_bias)
    ids_TK = select(record.logits_TE, router.rule, zero_E, router.threshold).ids_TK
    return ids_TK if record.mask_T is None else ids_TK.masked_fill(~record.mask_T.unsqueeze(-1), -1)
