"""The balancing policies by name: the one place that lists them."""

from typing import Any

from dist_moe.policies.adaptive_weight import AdaptiveWeight
from dist_moe.policies.auxiliary import Auxiliary
from dist_moe.policies.base import Policy
from dist_moe.policies.ema_quantile import EmaQuantile
from dist_moe.policies.expert_threshold import ExpertThresholds
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.momentum import Momentum
from dist_moe.policies.quantile import Quantile
from dist_moe.policies.unbalanced import Unbalanced

POLICIES: dict[str, type[Policy]] = {
    policy.name(): policy
    for policy in (
        Unbalanced,
        LossFree,
        AdaptiveWeight,
        Momentum,
        Quantile,
        EmaQuantile,
        ExpertThresholds,
        Auxiliary,
    )
}
DEFAULT: type[Policy] = LossFree


def make_policy(name: str, **fields: Any) -> Policy:
    """A policy by its name, with its other fields at their defaults.

    Raises:
        ValueError: The name is unknown, or a field is unknown or out of range.
    """
    if name not in POLICIES:
        raise ValueError(f"balance.policy={name!r} is unknown; use one of {', '.join(POLICIES)}")
    return POLICIES[name].model_validate({"policy": name, **fields})


def policies_with(field: str) -> list[str]:
    """The names of the policies that have this field."""
    return [name for name, policy in POLICIES.items() if field in policy.model_fields]


def foreign_defaults(name: str) -> dict[str, Any]:
    """The fields that other policies have and the policy `name` has not, with their defaults."""
    own = POLICIES[name].model_fields
    return {
        field: info.default
        for policy in POLICIES.values()
        for field, info in policy.model_fields.items()
        if field not in own
    }
