"""Which selections, scores and balancing policies go together, and why the others do not: one table."""

import itertools
from typing import get_args

from dist_moe.policies.base import Refusal
from dist_moe.policies.expert_threshold import ExpertThresholds
from dist_moe.policies.registry import POLICIES
from dist_moe.policies.unbalanced import Unbalanced
from dist_moe.scores import OVER_LOGITS, Score

SELECTIONS = ("top_k", "threshold", "expert_threshold", "uniform", "zipf")
RANDOM_SELECTIONS = ("uniform", "zipf")
SCORES: tuple[str, ...] = get_args(Score)


def refusal(selection: str, score: str, policy: str) -> Refusal | None:
    """Why the combination is refused; None where it is possible.

    Args:
        selection: One of `SELECTIONS`.
        score: One of `SCORES`.
        policy: The name of a policy.
    """
    if selection == "threshold" and score != "softmax":
        return Refusal(
            "adds up probabilities over all experts, which router.score=softmax alone gives",
            "set router.score=softmax",
        )
    if selection == "expert_threshold" and score in OVER_LOGITS:
        return Refusal(
            "compares the logit of each expert with a threshold, for a score that depends on that logit alone",
            "set router.score=sigmoid",
        )
    if selection == "expert_threshold" and POLICIES[policy] is not ExpertThresholds:
        return Refusal(
            f"needs the thresholds that balance.policy={ExpertThresholds.name()} alone sets",
            f"set balance.policy={ExpertThresholds.name()}",
        )
    if selection in RANDOM_SELECTIONS and POLICIES[policy] is not Unbalanced:
        return Refusal(
            "draws experts without reading the scores, so a balancer would have no effect",
            f"set balance.policy={Unbalanced.name()}",
        )
    return POLICIES[policy].refusal(selection, score)


def markdown() -> str:
    """The table of docs/routing.md: a row for each selection and score, a column for each policy."""
    pairs = list(itertools.product(SELECTIONS, SCORES))
    refusals = [refusal(*pair, policy) for pair in pairs for policy in POLICIES]
    reasons = list(dict.fromkeys(refused.rule for refused in refusals if refused is not None))
    lines = [
        f"| `router.selection` | `router.score` | {' | '.join(f'`{policy}`' for policy in POLICIES)} |",
        f"|{' --- |' * (len(POLICIES) + 2)}",
    ]
    for pair in pairs:
        row = [refusal(*pair, policy) for policy in POLICIES]
        cells = ["yes" if refused is None else f"no ({reasons.index(refused.rule) + 1})" for refused in row]
        lines.append(f"| {' | '.join([*pair, *cells])} |")
    return "\n".join([*lines, "", *(f"{number}. It {reason}." for number, reason in enumerate(reasons, 1))])
