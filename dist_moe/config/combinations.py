"""Which selections, scores and balancing policies go together, and why the others do not: one table."""

import itertools
from typing import NamedTuple

SELECTIONS = ("top_k", "threshold", "uniform", "zipf")
FORCED = ("uniform", "zipf")
SCORES = ("sigmoid", "softmax", "softmax_selected", "sqrt_softplus")
POLICIES = ("none", "loss_free", "adaptive_weight", "quantile", "auxiliary")


class Refusal(NamedTuple):
    """Why a combination is refused, and what to do instead."""

    rule: str
    remedy: str


def refusal(selection: str, score: str, policy: str) -> Refusal | None:
    """What speaks against a combination; None where it is possible."""
    if selection == "threshold" and score != "softmax":
        return Refusal(
            "adds up probabilities over all experts, which router.score=softmax alone gives",
            "set router.score=softmax",
        )
    if selection in FORCED and policy != "none":
        return Refusal(
            "draws experts without looking at scores, so a balancer would move what nobody reads",
            "set balance.policy=none",
        )
    if policy == "adaptive_weight" and score not in ("softmax", "softmax_selected"):
        return Refusal(
            "needs probabilities for its weights to multiply, which only the softmax scores give",
            "set router.score=softmax, or balance.policy=loss_free with balance.form=multiplicative",
        )
    if selection == "threshold" and policy == "quantile":
        return Refusal(
            "finds the bias with which each expert gets K of E tokens, and threshold routing has no K",
            "use adaptive_weight, loss_free or auxiliary",
        )
    return None


def markdown() -> str:
    """The table as it stands in docs/routing.md: a row for each selection and score, a column for each policy."""
    pairs = list(itertools.product(SELECTIONS, SCORES))
    every = [refusal(*pair, policy) for pair in pairs for policy in POLICIES]
    reasons = list(dict.fromkeys(found.rule for found in every if found is not None))
    lines = [
        f"| `router.selection` | `router.score` | {' | '.join(f'`{policy}`' for policy in POLICIES)} |",
        f"|{' --- |' * (len(POLICIES) + 2)}",
    ]
    for pair in pairs:
        found = [refusal(*pair, policy) for policy in POLICIES]
        cells = ["yes" if one is None else f"no ({reasons.index(one.rule) + 1})" for one in found]
        lines.append(f"| {' | '.join([*pair, *cells])} |")
    return "\n".join([*lines, "", *(f"{number}. It {reason}." for number, reason in enumerate(reasons, 1))])
