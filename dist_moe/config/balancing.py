"""Whether the router and the balancer of a configuration fit together, and fit the model."""

from dist_moe.config.combinations import RANDOM_SELECTIONS, refusal
from dist_moe.config.model import ROUTING_VALUES, routing_key
from dist_moe.config.pretrained import UPCYCLE_KEY, weights_source
from dist_moe.config.schema import Config
from dist_moe.config.sections.router import RouterConfig
from dist_moe.errors import Violation
from dist_moe.policies.base import RoutingValues
from dist_moe.text import counted, up_to


def balancing_violations(config: Config, router: RouterConfig, experts: int) -> list[Violation]:
    """What is wrong between the router, the balancing policy and the model.

    Args:
        config: The configuration, of which `balance` and the keys of the model are read.
        router: `config.router` with every field filled.
        experts: Routed experts of a layer.
    """
    violations = [*_combination(config, router), *selection_violations(router, experts, routing_key(config, "groups"))]
    upcycled = weights_source(config.model).key == UPCYCLE_KEY
    if router.selection == "expert_threshold" and upcycled and not router.min_experts:
        rule = "lets a token take no expert, and model.upcycle_from begins with the result of the dense network"
        violations.append(Violation("router.min_experts", router.min_experts, rule, "set it to 1"))
    violations += _random(config, router) if router.selection in RANDOM_SELECTIONS else []
    return violations + _policy(config, router, experts)


def selection_violations(router: RouterConfig, experts: int, groups_key: str = "router.groups") -> list[Violation]:
    """What is wrong among the fields of a selection.

    Args:
        router: With every field filled.
        experts: Routed experts of a layer.
        groups_key: The key that sets the expert groups.
    """
    if router.selection == "threshold":
        violations = _threshold(router, experts, groups_key)
    elif router.selection == "expert_threshold":
        violations = _expert_threshold(router, experts)
    else:
        violations = _fixed_number(router)
    if router.min_experts and router.selection != "expert_threshold":
        rule = f"has no meaning with router.selection={router.selection}, where each token takes an expert"
        remedy = "leave it out, or set router.selection=expert_threshold"
        violations.append(Violation("router.min_experts", router.min_experts, rule, remedy))
    if router.zipf_exponent != RouterConfig.model_fields["zipf_exponent"].default and router.selection != "zipf":
        rule = f"has no meaning with router.selection={router.selection}"
        remedy = "leave it out, or set router.selection=zipf"
        violations.append(Violation("router.zipf_exponent", router.zipf_exponent, rule, remedy))
    return violations


def _combination(config: Config, router: RouterConfig) -> list[Violation]:
    refused = refusal(router.selection, str(router.score), config.balance.policy)
    if refused is None:
        return []
    by_selection = router.selection in (*RANDOM_SELECTIONS, "expert_threshold") or (
        router.selection == "threshold" and router.score != "softmax"
    )
    key, value = ("router.selection", router.selection) if by_selection else ("balance.policy", config.balance.policy)
    return [Violation(key, value, *refused)]


def _threshold(router: RouterConfig, experts: int, groups_key: str) -> list[Violation]:
    """What is wrong with the fields of threshold routing."""
    violations = _max_experts(router, experts)
    max_experts = router.max_experts or experts
    if router.groups != 1:
        rule = "limits a token to some groups, which threshold routing does not support"
        violations.append(Violation(groups_key, router.groups, rule, "set it to 1"))
    limit, target = min(max_experts, experts), router.target_experts_per_token
    if target is not None and not 1 <= target < limit:
        rule = f"cannot be reached, since a token takes {up_to(limit)} {'expert' if limit == 1 else 'experts'}"
        remedy = f"give 1 to below {limit}, or null" if limit > 1 else "set it to null"
        violations.append(Violation("router.target_experts_per_token", target, rule, remedy))
    return violations


def _max_experts(router: RouterConfig, experts: int) -> list[Violation]:
    """What is wrong with the maximum number of experts, where tokens take different numbers."""
    violations = []
    max_experts = router.max_experts or experts
    if max_experts > experts:
        rule = f"is more than the model's {counted(experts, 'expert')}"
        violations.append(Violation("router.max_experts", max_experts, rule, f"use {up_to(experts)}, or null"))
    if router.normalize and max_experts == 1:
        rule = "makes the weight of a token's one expert 1 for any probability, so the router cannot learn"
        violations.append(Violation("router.normalize", True, rule, "set it to false, or max_experts above 1"))
    return violations


def _expert_threshold(router: RouterConfig, experts: int) -> list[Violation]:
    """What is wrong with the fields of routing by expert thresholds."""
    violations = _max_experts(router, experts)
    top_k, max_experts = router.top_k or 1, router.max_experts or experts
    if max_experts < top_k:
        rule = f"is less than the {counted(top_k, 'expert')} that a token takes on average (top_k)"
        violations.append(Violation("router.max_experts", max_experts, rule, f"use {top_k} or more, or null"))
    for name in ("threshold", "target_experts_per_token"):
        if (value := getattr(router, name)) != RouterConfig.model_fields[name].default:
            rule = "has no meaning with router.selection=expert_threshold, whose thresholds are those of the experts"
            remedy = "leave it out (top_k is the average), or set router.selection=threshold"
            violations.append(Violation(f"router.{name}", value, rule, remedy))
    return violations


def _fixed_number(router: RouterConfig) -> list[Violation]:
    """What is wrong with the fields of a selection in which each token takes `top_k` experts."""
    violations = []
    for name in ("threshold", "target_experts_per_token", "max_experts"):
        if (value := getattr(router, name)) != RouterConfig.model_fields[name].default:
            rule = f"has no meaning with router.selection={router.selection}, where each token takes top_k experts"
            remedy = "leave it out, or set router.selection=threshold"
            violations.append(Violation(f"router.{name}", value, rule, remedy))
    if router.score == "softmax_selected" and router.top_k == 1:
        rule = "makes the weight of a token's one expert 1 for any score, so the router cannot learn"
        violations.append(Violation("router.score", router.score, rule, "use softmax, or top_k above 1"))
    return violations


def _random(config: Config, router: RouterConfig) -> list[Violation]:
    """What has no effect on experts that are drawn at random."""
    violations = []
    losses = {
        "balance.auxiliary_loss": config.balance.auxiliary_loss,
        "balance.z_loss": config.balance.z_loss,
        "balance.orthogonality_loss": config.balance.orthogonality_loss,
        "router.entropy_loss": router.entropy_loss,
    }
    for key, value in losses.items():
        if value:
            rule = f"trains scores that router.selection={router.selection} does not read"
            violations.append(Violation(key, value, rule, "set it to 0"))
    if router.groups != 1:
        rule = f"limits a token to some groups, which router.selection={router.selection} does not support"
        violations.append(Violation(routing_key(config, "groups"), router.groups, rule, "set it to 1"))
    return violations


def _policy(config: Config, router: RouterConfig, experts: int) -> list[Violation]:
    """What the policy says of its own fields, with each `router.NAME` as the key that the user wrote."""
    routing = RoutingValues(router.selection, str(router.score), router.top_k or 0, router.groups or 1, experts)
    violations = []
    for violation in config.balance.violations(routing):
        section, _, name = violation.key.partition(".")
        in_model = section == "router" and name in ROUTING_VALUES
        violations.append(violation._replace(key=routing_key(config, name)) if in_model else violation)
    return violations
