"""Finds the rule of routing that gives the results of a router: selection, gate weights and gradients agree.

Shapes: T tokens, D model width, E experts, K experts a token takes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.moe.select import GroupScore, TopK, select
from dist_moe.scores import Score

Groups = tuple[int, int]
"""The number of groups, and the number of groups that a token may take experts from."""
SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus", "softmax_selected")
GROUP_SCORES: tuple[GroupScore, ...] = ("top_2", "max")
RELATIVE = 1e-4
"""Largest relative difference of a gate weight; routers are compared in fp32."""
FEW_DIFFERENT = 0.01
"""Share of tokens whose experts may differ: those with almost equal scores."""


class Sample(NamedTuple):
    """What a router gave for random tokens, with the graph.

    Attributes:
        hidden_TD: The tokens, which require gradients.
        logits_TE: Before the gate function.
        weights_TK: The gate weights.
        ids_TK: The experts.
    """

    hidden_TD: Tensor
    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor


def fit_rule(sample: Sample, groups: Groups = (1, 1), bias_E: Tensor | None = None) -> TopK | None:
    """Find the rule that gives a sample; None where no known rule does.

    Args:
        sample: Of a router.
        groups: To try besides no groups.
        bias_E: The selection bias of the sample; None for none.
    """
    used_E = torch.zeros(sample.logits_TE.shape[1]) if bias_E is None else bias_E
    for rule in _candidates(sample, groups, bias_E is not None):
        factor = _factor(sample, rule, used_E)
        if factor is not None:
            scaled = replace(rule, routed_scaling_factor=factor)
            if _same_gradient(sample, scaled, used_E):
                return scaled
    return None


def _candidates(sample: Sample, groups: Groups, has_bias: bool) -> Iterator[TopK]:
    top_k, experts = sample.ids_TK.shape[1], sample.logits_TE.shape[1]
    grouped = groups[0] > 1 and experts % groups[0] == 0
    for score, normalize, on_probabilities in itertools.product(SCORES, (False, True), (False, True)):
        if on_probabilities and not (has_bias and score == "softmax"):
            continue
        rule = TopK(top_k, score, normalize, bias_on_probabilities=on_probabilities)
        yield rule
        for group_score in GROUP_SCORES if grouped else ():
            yield replace(rule, groups=groups[0], topk_groups=groups[1], group_score=group_score)


def _factor(sample: Sample, rule: TopK, bias_E: Tensor) -> float | None:
    """Return by which factor the gate weights are those of a rule; None where they or the experts differ."""
    with torch.no_grad():
        ours = select(sample.logits_TE, rule, bias_E)
        theirs_TK, order_TK = sample.ids_TK.sort(dim=1)
        mine_TK, our_order_TK = ours.ids_TK.sort(dim=1)
        equal_T = (theirs_TK == mine_TK).all(dim=1)
        if float((~equal_T).float().mean()) > FEW_DIFFERENT:
            return None
        ratio_TK = sample.weights_TK.gather(1, order_TK) / ours.weights_TK.gather(1, our_order_TK)
        ratio_TK = ratio_TK[equal_T]
        factor = float(ratio_TK.median())
        if not factor > 0 or not bool(((ratio_TK / factor - 1).abs() <= RELATIVE).all()):
            return None
    return round(factor, 3) if abs(round(factor, 3) / factor - 1) < RELATIVE else factor


def _same_gradient(sample: Sample, rule: TopK, bias_E: Tensor) -> bool:
    """Whether the gate weights of a rule have the router's gradient with respect to the hidden states."""
    ours = select(sample.logits_TE, rule, bias_E)
    same_T1 = (sample.ids_TK.sort(dim=1).values == ours.ids_TK.sort(dim=1).values).all(dim=1, keepdim=True)
    direction_E = torch.randn(sample.logits_TE.shape[1], generator=torch.Generator().manual_seed(1))
    gradients = []
    for weights_TK, ids_TK in ((sample.weights_TK, sample.ids_TK), (ours.weights_TK, ours.ids_TK)):
        value = (weights_TK * direction_E[ids_TK] * same_T1).sum()
        if not value.requires_grad:
            return False
        gradients.append(torch.autograd.grad(value, sample.hidden_TD, retain_graph=True)[0])
    theirs_TD, mine_TD = gradients
    return float((theirs_TD - mine_TD).norm()) <= 10 * RELATIVE * float(theirs_TD.norm())
