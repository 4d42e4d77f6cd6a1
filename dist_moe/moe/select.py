"""Pure selection: routing logits in, experts and mixture weights out.

Shapes: T tokens, E experts, K experts a token takes at most, G groups of experts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.moe.records import Routing
from dist_moe.scores import OVER_LOGITS, Score


@dataclass(frozen=True)
class TopK:
    """The rule of top-K routing.

    top_k: experts a token takes. score: the gate function. normalise: divide a token's weights by their sum.
    scaling: factor on the weights. groups, top_groups: DeepSeek-V3's group-limited selection; groups=1 is none.
    multiplicative: a bias b multiplies a score by exp(b) rather than being added to it. shapes_mixture: the mixture
    weights follow the biased scores too.
    """

    top_k: int
    score: Score
    normalize: bool = False
    routed_scaling_factor: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    multiplicative: bool = False
    bias_in_gate_weights: bool = False

    @property
    def max_experts_per_token(self) -> int:
        """Experts a token takes at most."""
        return self.top_k


@dataclass(frozen=True)
class ThresholdRouting:
    """The rule of threshold routing over softmax probabilities (Huang et al. 2024, arXiv 2403.07652, section 3.1).

    threshold: the cumulative probability that a token's experts reach; the router may hold a newer value.
    max_experts: experts a token takes at most. normalise, scaling, shapes_mixture: as of `TopK`; the paper
    takes the probabilities as they are.
    """

    threshold: float
    max_experts: int
    normalize: bool = False
    routed_scaling_factor: float = 1.0
    bias_in_gate_weights: bool = False
    score: Score = "softmax"

    @property
    def max_experts_per_token(self) -> int:
        """Experts a token takes at most."""
        return self.max_experts


@dataclass(frozen=True)
class RandomRouting:
    """Experts drawn instead of chosen, for benchmarks.

    top_k: experts a token takes. The first is expert i with probability ~ 1 / (i + 1)**skew (Zipf; 0 is uniform), and
    each further one is drawn likewise from those left. The weights are those of `TopK` for the drawn experts.
    """

    top_k: int
    zipf_exponent: float
    score: Score
    normalize: bool = False
    routed_scaling_factor: float = 1.0

    @property
    def max_experts_per_token(self) -> int:
        """Experts a token takes at most."""
        return self.top_k


Rule = TopK | ThresholdRouting | RandomRouting
_32_BITS = 0xFFFFFFFF


class Inputs(NamedTuple):
    """Where a bias enters the selection: log_weight_E, for example, makes choice = score * exp(log_weight)."""

    score_bias_E: Tensor | None = None
    logit_bias_E: Tensor | None = None
    log_weight_E: Tensor | None = None


def bias_inputs(rule: Rule, bias_E: Tensor) -> Inputs:
    """The place of a router's bias: on the logits of a softmax, and after any other gate function.

    Adding b to the logits of a softmax multiplies its probabilities by exp(b) and makes them sum to 1 again.
    """
    if isinstance(rule, RandomRouting):
        return Inputs()
    if rule.score in OVER_LOGITS:
        return Inputs(logit_bias_E=bias_E)
    if isinstance(rule, TopK) and rule.multiplicative:
        return Inputs(log_weight_E=bias_E)
    return Inputs(score_bias_E=bias_E)


def gate_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """The gate function, in fp32 or wider -> scores_TE; `softmax_selected` gives the softmax over all experts."""
    if score == "sigmoid":
        return logits_TE.sigmoid()
    if score == "sqrt_softplus":
        # The root's slope is infinite at 0, to which softplus underflows.
        return F.softplus(logits_TE).clamp_min(torch.finfo(logits_TE.dtype).tiny).sqrt()
    return logits_TE.softmax(dim=-1)


def select(logits_TE: Tensor, rule: Rule, bias_E: Tensor, threshold: Tensor | float | None = None) -> Routing:
    """The experts and weights of each token by any rule; `threshold` replaces the one of a `ThresholdRouting` rule."""
    inputs = bias_inputs(rule, bias_E)
    if isinstance(rule, ThresholdRouting):
        return select_by_threshold(
            logits_TE, rule, rule.threshold if threshold is None else threshold, inputs.logit_bias_E
        )
    if isinstance(rule, RandomRouting):
        return _weigh(
            logits_TE, _draw(logits_TE, rule), TopK(rule.top_k, rule.score, rule.normalize, rule.routed_scaling_factor)
        )
    return select_top_k(logits_TE, rule, *inputs)


def select_top_k(
    logits_TE: Tensor,
    rule: TopK,
    score_bias_E: Tensor | None = None,
    logit_bias_E: Tensor | None = None,
    log_weight_E: Tensor | None = None,
) -> Routing:
    """Select the experts of each token by biased scores and weigh them by the unbiased ones.

    logits_TE: fp32 or wider. score_bias_E is added after the gate function (Loss-Free Balancing on sigmoid scores:
    Wang et al. 2024, arXiv 2408.15664, equation 3), logit_bias_E before it (any bias on softmax scores), and
    exp(log_weight_E) multiplies the scores. They shape the selection alone, unless rule.shapes_mixture says
    otherwise, and have no gradient.
    """
    with torch.no_grad():
        choice_TE = biased_scores(logits_TE.detach(), rule, Inputs(score_bias_E, logit_bias_E, log_weight_E))
        if rule.groups > 1:
            choice_TE = _keep_topk_groups(choice_TE, rule.groups, rule.topk_groups)
        ids_TK = _highest(choice_TE, rule.top_k)
    if rule.bias_in_gate_weights and logit_bias_E is not None:
        logits_TE = logits_TE + logit_bias_E
    return _weigh(logits_TE, ids_TK, rule)


def biased_scores(logits_TE: Tensor, rule: TopK, inputs: Inputs) -> Tensor:
    """What top-K selection compares: the scores with the bias in its place."""
    if inputs.logit_bias_E is not None:
        logits_TE = logits_TE + inputs.logit_bias_E
    scores_TE = gate_scores(logits_TE, rule.score)
    if inputs.log_weight_E is not None:
        scores_TE = scores_TE * inputs.log_weight_E.exp()
    return scores_TE if inputs.score_bias_E is None else scores_TE + inputs.score_bias_E


def select_by_threshold(
    logits_TE: Tensor, rule: ThresholdRouting, threshold: Tensor | float, logit_bias_E: Tensor | None = None
) -> Routing:
    """For each token the fewest experts, in order of probability, whose probabilities add up to the threshold.

    The expert with which the sum reaches it is taken; at least one is, and at most rule.max_experts (Huang et al.
    2024, arXiv 2403.07652, section 3.1). logit_bias_E shapes the order and the sum (exp of it is a weight of the
    expert's probability), and the mixture weights where rule.shapes_mixture says so. -> Routing with as many columns
    as the token with most experts has; a slot that a token leaves empty has id -1 and weight 0.
    """
    biased_TE = logits_TE if logit_bias_E is None else logits_TE + logit_bias_E
    with torch.no_grad():
        sorted_TE, order_TE = biased_TE.detach().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before_TE = F.pad(sorted_TE.cumsum(dim=-1)[:, :-1], (1, 0))
        taken_TE = before_TE < threshold
        taken_TE[:, 0] = True
        taken_TE[:, rule.max_experts :] = False
        most = int(taken_TE.sum(dim=1).max()) if len(taken_TE) else 1
        taken_TK, order_TK = taken_TE[:, :most], order_TE[:, :most]
    probabilities_TE = (biased_TE if rule.bias_in_gate_weights else logits_TE).softmax(dim=-1)
    weights_TK = probabilities_TE.gather(1, order_TK) * taken_TK
    return Routing(order_TK.masked_fill(~taken_TK, -1), _scaled(weights_TK, rule))


def _weigh(logits_TE: Tensor, ids_TK: Tensor, rule: TopK) -> Routing:
    """The mixture weights of the experts that were selected."""
    if rule.score == "softmax_selected":
        weights_TK = logits_TE.gather(1, ids_TK).softmax(dim=-1)
    else:
        weights_TK = gate_scores(logits_TE, rule.score).gather(1, ids_TK)
    return Routing(ids_TK, _scaled(weights_TK, rule))


def _scaled(weights_TK: Tensor, rule: TopK | ThresholdRouting) -> Tensor:
    if rule.normalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * rule.routed_scaling_factor


def _highest(values_TN: Tensor, count: int) -> Tensor:
    """The places of the highest values, equal ones in their order; `topk` gives those in an order of its own."""
    return values_TN.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _keep_topk_groups(choice_TE: Tensor, groups: int, topk_groups: int) -> Tensor:
    """Leave each token the experts of its best groups; a group's score is the sum of its two best (DeepSeek-V3)."""
    choice_TGe = choice_TE.unflatten(1, (groups, -1))
    group_scores_TG = choice_TGe.topk(min(2, choice_TGe.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = _highest(group_scores_TG, topk_groups)
    closed_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept, False)
    return choice_TGe.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).view_as(choice_TE)


def _draw(logits_TE: Tensor, rule: RandomRouting) -> Tensor:
    """K different experts a token, by noise made of the bits of its logits (Gumbel's top-K).

    So they differ between tokens, layers and steps, recomputation finds the same ones, and nothing is random but the
    logits. The noise is murmur3's last mixing of the bits of each logit and the number of its expert.
    """
    experts_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    mixed_TE = (logits_TE.float().contiguous().view(torch.int32).long() + 0x9E3779B9 * (experts_E + 1)) & _32_BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed_TE = ((mixed_TE ^ (mixed_TE >> shift)) * factor) & _32_BITS
    uniform_TE = ((mixed_TE ^ (mixed_TE >> 16)).double() + 0.5) / 2.0**32
    gumbel_TE = -(-uniform_TE.log()).log()
    return _highest(gumbel_TE - rule.zipf_exponent * (experts_E + 1).double().log(), rule.top_k)
