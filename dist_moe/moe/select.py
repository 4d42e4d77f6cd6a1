"""Pure selection: routing logits in, experts and gate weights out.

Shapes: T tokens, E experts, K columns (the maximum number of experts a token takes), G groups of experts.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.moe.kernels import kernels_for
from dist_moe.moe.records import Routing
from dist_moe.scores import OVER_LOGITS, Score

GroupScore = Literal["top_2", "max"]


@dataclass(frozen=True)
class TopK:
    """The rule of top-K routing.

    Attributes:
        top_k: Experts a token takes.
        score: The gate function.
        normalize: Divide a token's gate weights by their sum.
        routed_scaling_factor: Factor on the gate weights.
        groups: Number of expert groups of DeepSeek-V3's group-limited selection; 1 means that all experts are eligible.
        topk_groups: Number of groups that a token may take experts from.
        multiplicative: A bias b multiplies a score by exp(b) rather than being added to it.
        bias_in_gate_weights: Compute the gate weights from the biased scores too.
        group_score: What a group is chosen by: the sum of its two best biased scores (DeepSeek-V3), or its best one
            (DeepSeek-V2).
        bias_on_probabilities: Add the bias to the probabilities of a softmax (ERNIE 4.5) rather than to its logits.
    """

    top_k: int
    score: Score
    normalize: bool = False
    routed_scaling_factor: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    multiplicative: bool = False
    bias_in_gate_weights: bool = False
    group_score: GroupScore = "top_2"
    bias_on_probabilities: bool = False

    @property
    def max_experts_per_token(self) -> int:
        """Maximum number of experts a token takes."""
        return self.top_k


@dataclass(frozen=True)
class ThresholdRouting:
    """The rule of threshold routing over softmax probabilities (Huang et al. 2024, arXiv 2403.07652, section 3.1).

    Attributes:
        threshold: The cumulative probability that a token's experts reach; the router may hold a newer value.
        max_experts: Maximum number of experts a token takes.
        normalize, routed_scaling_factor, bias_in_gate_weights: As of `TopK`; the gate weights of the paper are the
            probabilities themselves.
        score: The gate function, always softmax.
    """

    threshold: float
    max_experts: int
    normalize: bool = False
    routed_scaling_factor: float = 1.0
    bias_in_gate_weights: bool = False
    score: Score = "softmax"

    @property
    def max_experts_per_token(self) -> int:
        """Maximum number of experts a token takes."""
        return self.max_experts


@dataclass(frozen=True)
class ExpertThreshold:
    """The rule of expert thresholds: a token takes each expert whose logit is above that expert's threshold.

    The threshold of an expert is the negated selection bias; the policy `expert_threshold` sets it.

    Attributes:
        top_k: Experts a token takes on average once the thresholds are set, and exactly before.
        max_experts: Maximum number of experts a token takes.
        min_experts: Minimum number, 0 or 1.
        score: The gate function, by which the gate weights are computed.
        normalize, routed_scaling_factor: As of `TopK`.
    """

    top_k: int
    max_experts: int
    min_experts: int
    score: Score
    normalize: bool = False
    routed_scaling_factor: float = 1.0

    @property
    def max_experts_per_token(self) -> int:
        """Maximum number of experts a token takes."""
        return self.max_experts


@dataclass(frozen=True)
class RandomRouting:
    """Experts drawn at random, for benchmarks; the gate weights are those of `TopK` for the drawn experts.

    Attributes:
        top_k: Experts a token takes.
        zipf_exponent: Expert i is drawn first with probability proportional to 1 / (i + 1)**zipf_exponent (0 is
            uniform), and each further expert is drawn in the same way from the remaining ones.
        score, normalize, routed_scaling_factor: As of `TopK`.
    """

    top_k: int
    zipf_exponent: float
    score: Score
    normalize: bool = False
    routed_scaling_factor: float = 1.0

    @property
    def max_experts_per_token(self) -> int:
        """Maximum number of experts a token takes."""
        return self.top_k


Rule = TopK | ThresholdRouting | ExpertThreshold | RandomRouting
_32_BITS = 0xFFFFFFFF


class BiasInputs(NamedTuple):
    """Where a bias enters the selection; at most one field is set.

    Attributes:
        score_bias_E: Added to the scores.
        logit_bias_E: Added to the logits, before the gate function.
        log_weight_E: Its exponential multiplies the scores.
    """

    score_bias_E: Tensor | None = None
    logit_bias_E: Tensor | None = None
    log_weight_E: Tensor | None = None


def bias_inputs(rule: Rule, bias_E: Tensor) -> BiasInputs:
    """Where a router's bias enters: on the logits of a softmax or of thresholds, after any other gate function.

    Adding b to the logits of a softmax multiplies its probabilities by exp(b) and makes them sum to 1 again.
    """
    if isinstance(rule, RandomRouting):
        return BiasInputs()
    if isinstance(rule, TopK) and rule.bias_on_probabilities:
        return BiasInputs(score_bias_E=bias_E)
    if rule.score in OVER_LOGITS or isinstance(rule, ExpertThreshold):
        return BiasInputs(logit_bias_E=bias_E)
    if isinstance(rule, TopK) and rule.multiplicative:
        return BiasInputs(log_weight_E=bias_E)
    return BiasInputs(score_bias_E=bias_E)


def gate_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """Apply the gate function, in fp32 or wider; `softmax_selected` gives the softmax over all experts.

    Returns:
        [T, E].
    """
    if score == "sigmoid":
        return logits_TE.sigmoid()
    if score == "sqrt_softplus":
        # The root's slope is infinite at 0, to which softplus underflows.
        return F.softplus(logits_TE).clamp_min(torch.finfo(logits_TE.dtype).tiny).sqrt()
    return logits_TE.softmax(dim=-1)


def select(logits_TE: Tensor, rule: Rule, bias_E: Tensor, threshold: Tensor | float | None = None) -> Routing:
    """Select experts by any rule.

    Args:
        logits_TE: fp32 or wider.
        rule: The rule.
        bias_E: The selection bias, fp32.
        threshold: Replaces that of a `ThresholdRouting` rule; None keeps it.
    """
    inputs = bias_inputs(rule, bias_E)
    if isinstance(rule, ThresholdRouting):
        return select_by_threshold(
            logits_TE, rule, rule.threshold if threshold is None else threshold, inputs.logit_bias_E
        )
    if isinstance(rule, ExpertThreshold):
        return select_by_expert_threshold(logits_TE, rule, bias_E)
    if isinstance(rule, RandomRouting):
        weighing = TopK(rule.top_k, rule.score, rule.normalize, rule.routed_scaling_factor)
        return _weigh(logits_TE, gate_scores(logits_TE, rule.score), _draw(logits_TE, rule), weighing)
    return select_top_k(logits_TE, rule, *inputs)


def select_top_k(
    logits_TE: Tensor,
    rule: TopK,
    score_bias_E: Tensor | None = None,
    logit_bias_E: Tensor | None = None,
    log_weight_E: Tensor | None = None,
) -> Routing:
    """Select the experts of each token by biased scores and weigh them by the unbiased ones.

    The biases have no gradient, and affect the gate weights only with `rule.bias_in_gate_weights`.

    Args:
        logits_TE: fp32 or wider.
        rule: The rule.
        score_bias_E: Added after the gate function (Loss-Free Balancing on sigmoid scores: Wang et al. 2024,
            arXiv 2408.15664, equation 3).
        logit_bias_E: Added before it (any bias on softmax scores).
        log_weight_E: Its exponential multiplies the scores.
    """
    scores_TE = gate_scores(logits_TE, rule.score)
    with torch.no_grad():
        inputs = BiasInputs(score_bias_E, logit_bias_E, log_weight_E)
        choice_TE = biased_scores(logits_TE.detach(), rule, inputs, scores_TE.detach())
        if rule.groups > 1:
            choice_TE = _keep_topk_groups(choice_TE, rule)
        ids_TK = _highest(choice_TE, rule.top_k)
    if rule.bias_in_gate_weights and logit_bias_E is not None:
        logits_TE = logits_TE + logit_bias_E
        scores_TE = gate_scores(logits_TE, rule.score)
    return _weigh(logits_TE, scores_TE, ids_TK, rule)


def biased_scores(logits_TE: Tensor, rule: TopK, inputs: BiasInputs, scores_TE: Tensor | None = None) -> Tensor:
    """Return the biased scores [T, E], by which top-K selection orders the experts.

    Args:
        logits_TE: The logits.
        rule: The rule.
        inputs: The bias.
        scores_TE: `gate_scores` of the logits, where the caller has them.
    """
    if inputs.logit_bias_E is not None:
        scores_TE = gate_scores(logits_TE + inputs.logit_bias_E, rule.score)
    elif scores_TE is None:
        scores_TE = gate_scores(logits_TE, rule.score)
    if inputs.log_weight_E is not None:
        scores_TE = scores_TE * inputs.log_weight_E.exp()
    return scores_TE if inputs.score_bias_E is None else scores_TE + inputs.score_bias_E


def select_by_threshold(
    logits_TE: Tensor, rule: ThresholdRouting, threshold: Tensor | float, logit_bias_E: Tensor | None = None
) -> Routing:
    """Select for each token the fewest experts, in order of probability, whose probabilities reach the threshold.

    The expert with which the sum reaches it is taken; at least one is, and at most `rule.max_experts`.

    Args:
        logits_TE: fp32 or wider.
        rule: The rule.
        threshold: The cumulative probability.
        logit_bias_E: Added to the logits for the order and the sum (its exponential is a weight on the expert's
            probability), and for the gate weights with `rule.bias_in_gate_weights`.

    Returns:
        Routing with as many columns as the token with the most experts has experts, and on other devices than the CPU
        `rule.max_experts`; an empty slot has id -1, weight 0.

    Source: Huang et al. 2024, arXiv 2403.07652, section 3.1.
    """
    biased_TE = logits_TE if logit_bias_E is None else logits_TE + logit_bias_E
    with torch.no_grad():
        probabilities_TE = biased_TE.detach().softmax(dim=-1)
        order_TK = _highest(probabilities_TE, rule.max_experts)
        before_TK = F.pad(probabilities_TE.gather(1, order_TK).cumsum(dim=-1)[:, :-1], (1, 0))
        taken_TK = before_TK < threshold
        taken_TK[:, 0] = True
        if kernels_for(order_TK.device).waits:
            columns = int(taken_TK.sum(dim=1).max()) if len(taken_TK) else 1
            taken_TK, order_TK = taken_TK[:, :columns], order_TK[:, :columns]
    probabilities_TE = (biased_TE if rule.bias_in_gate_weights else logits_TE).softmax(dim=-1)
    weights_TK = probabilities_TE.gather(1, order_TK) * taken_TK
    return Routing(order_TK.masked_fill(~taken_TK, -1), _scaled(weights_TK, rule))


def select_by_expert_threshold(logits_TE: Tensor, rule: ExpertThreshold, bias_E: Tensor) -> Routing:
    """Select for each token the experts whose logit is above their threshold -b: those with logit + bias above 0.

    Before the thresholds are set, which is where every bias is 0, each token takes the `rule.top_k` highest logits.
    The selection of a token depends on no other token, so it is causal.

    Args:
        logits_TE: fp32 or wider.
        rule: The rule.
        bias_E: The negated thresholds, fp32.

    Returns:
        Routing with as many columns as the token with the most experts has experts, and on other devices than the CPU
        `rule.max_experts`, the highest biased logit first; an empty slot has id -1, weight 0.

    Source: Expert Threshold, Sun et al. 2026, arXiv 2603.11535, whose tokens may take no expert and whose gate weights
    are not normalized. Its full text was not available: a reconstruction.
    """
    with torch.no_grad():
        biased_TE = logits_TE.detach() + bias_E
        order_TK = _highest(biased_TE, rule.max_experts)
        place_K = torch.arange(rule.max_experts, device=logits_TE.device)
        above_TK = biased_TE.gather(1, order_TK) > 0
        taken_TK = torch.where(bias_E.any(), above_TK, (place_K < rule.top_k).expand_as(above_TK))
        taken_TK = taken_TK | (place_K < rule.min_experts)
        if kernels_for(order_TK.device).waits:
            columns = max(1, int(taken_TK.sum(dim=1).max())) if len(taken_TK) else 1
            taken_TK, order_TK = taken_TK[:, :columns], order_TK[:, :columns]
    weights_TK = gate_scores(logits_TE, rule.score).gather(1, order_TK) * taken_TK
    return Routing(order_TK.masked_fill(~taken_TK, -1), _scaled(weights_TK, rule))


def _weigh(logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor, rule: TopK) -> Routing:
    """Compute the gate weights of the selected experts, from the logits and their `gate_scores`."""
    if rule.score == "softmax_selected":
        weights_TK = logits_TE.gather(1, ids_TK).softmax(dim=-1)
    else:
        weights_TK = scores_TE.gather(1, ids_TK)
    return Routing(ids_TK, _scaled(weights_TK, rule))


def _scaled(weights_TK: Tensor, rule: TopK | ThresholdRouting | ExpertThreshold) -> Tensor:
    if rule.normalize:
        weights_TK = _Normalize.apply(weights_TK)
    return weights_TK if rule.routed_scaling_factor == 1 else weights_TK * rule.routed_scaling_factor


class _Normalize(torch.autograd.Function):
    """weights / their sum, with a gradient of four operations, where autograd's of a quotient has nine."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor) -> Tensor:
        sum_T1 = weights_TK.sum(dim=-1, keepdim=True) + 1e-20
        normalized_TK = weights_TK / sum_T1
        ctx.save_for_backward(normalized_TK, sum_T1)
        return normalized_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        normalized_TK, sum_T1 = ctx.saved_tensors
        mean_T1 = (gradients[0] * normalized_TK).sum(dim=-1, keepdim=True)
        return (gradients[0] - mean_T1) / sum_T1


def _highest(values_TN: Tensor, count: int) -> Tensor:
    """The indices of the highest values, equal ones in order of index; `torch.topk` may return those in any order."""
    if kernels_for(values_TN.device).waits:
        # One value more than asked for, because a tie with the first one left out counts too. NaN is above nothing.
        best = values_TN.topk(min(count + 1, values_TN.shape[-1]), dim=-1)
        if bool((best.values[:, :-1] > best.values[:, 1:]).all()):
            return best.indices[:, :count]
    return values_TN.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _keep_topk_groups(choice_TE: Tensor, rule: TopK) -> Tensor:
    """Exclude experts outside a token's best groups."""
    choice_TGe = choice_TE.unflatten(1, (rule.groups, -1))
    best = min(2 if rule.group_score == "top_2" else 1, choice_TGe.shape[-1])
    group_scores_TG = choice_TGe.topk(best, dim=-1).values.sum(dim=-1)
    kept = _highest(group_scores_TG, rule.topk_groups)
    excluded_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept, False)
    return choice_TGe.masked_fill(excluded_TG.unsqueeze(-1), float("-inf")).view_as(choice_TE)


def _draw(logits_TE: Tensor, rule: RandomRouting) -> Tensor:
    """Draw K different experts for each token, with noise computed from the bits of its logits (Gumbel top-K).

    The draws differ between tokens, layers and steps, recomputation repeats them, and no random state is used.
    """
    # The noise is the finalizer of murmur3 on the bits of each logit and the id of its expert.
    experts_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    mixed_TE = (logits_TE.float().contiguous().view(torch.int32).long() + 0x9E3779B9 * (experts_E + 1)) & _32_BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed_TE = ((mixed_TE ^ (mixed_TE >> shift)) * factor) & _32_BITS
    uniform_TE = ((mixed_TE ^ (mixed_TE >> 16)).double() + 0.5) / 2.0**32
    gumbel_TE = -(-uniform_TE.log()).log()
    return _highest(gumbel_TE - rule.zipf_exponent * (experts_E + 1).double().log(), rule.top_k)
