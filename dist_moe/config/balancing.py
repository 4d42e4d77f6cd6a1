"""Whether the router and the balancer of a configuration fit together, and fit the model."""

from dist_moe.config.combinations import FORCED, refusal
from dist_moe.config.model import routing_key
from dist_moe.config.schema import Config
from dist_moe.config.sections.router import RouterConfig
from dist_moe.errors import Violation
from dist_moe.text import listed


def balancing_violations(config: Config, router: RouterConfig, experts: int) -> list[Violation]:
    """What is wrong between `router` (every field filled), `config.balance`, and a model of `experts` experts."""
    found = _combination(config, router)
    found += _threshold(config, router, experts) if router.selection == "threshold" else _fixed_number(router)
    found += _random(config, router) if router.selection in FORCED else []
    if router.zipf_exponent != RouterConfig.model_fields["zipf_exponent"].default and router.selection != "zipf":
        rule = f"has no meaning with router.selection={router.selection}"
        found.append(
            Violation("router.zipf_exponent", router.zipf_exponent, rule, "leave it out, or set router.selection=zipf")
        )
    if config.balance.policy == "quantile":
        found += _quantile(config, router, experts)
    return found + _fields_of_policies(config)


def _combination(config: Config, router: RouterConfig) -> list[Violation]:
    refused = refusal(router.selection, str(router.score), config.balance.policy)
    if refused is None:
        return []
    by_selection = router.selection in FORCED or (router.selection == "threshold" and router.score != "softmax")
    key, value = ("router.selection", router.selection) if by_selection else ("balance.policy", config.balance.policy)
    return [Violation(key, value, *refused)]


def _threshold(config: Config, router: RouterConfig, experts: int) -> list[Violation]:
    found = []
    most = router.max_experts or experts
    if most > experts:
        rule = f"is more than the model's {experts} experts"
        found.append(Violation("router.max_experts", most, rule, f"use 1 to {experts}, or null"))
    if router.normalize and most == 1:
        rule = "makes the weight of a token's one expert 1 whatever its probability, so the router cannot learn"
        found.append(Violation("router.normalize", True, rule, "set it to false, or max_experts above 1"))
    if router.groups != 1:
        rule = "limits a token to some groups, which threshold routing does not know"
        found.append(Violation(routing_key(config, "groups"), router.groups, rule, "set it to 1"))
    if router.target_experts_per_token is not None and not 1 <= router.target_experts_per_token < min(most, experts):
        rule = f"cannot be held, since a token takes 1 to {min(most, experts)} experts"
        remedy = f"give 1 to below {min(most, experts)}, or null"
        found.append(Violation("router.target_experts_per_token", router.target_experts_per_token, rule, remedy))
    return found


def _fixed_number(router: RouterConfig) -> list[Violation]:
    found = []
    for name in ("threshold", "target_experts_per_token", "max_experts"):
        if (value := getattr(router, name)) != RouterConfig.model_fields[name].default:
            rule = f"has no meaning with router.selection={router.selection}, where each token takes top_k experts"
            found.append(Violation(f"router.{name}", value, rule, "leave it out, or set router.selection=threshold"))
    if router.score == "softmax_selected" and router.top_k == 1:
        rule = "makes the weight of a token's one expert 1 whatever its score, so the router cannot learn"
        found.append(Violation("router.score", router.score, rule, "use softmax, or top_k above 1"))
    return found


def _random(config: Config, router: RouterConfig) -> list[Violation]:
    """What asks forced routing to be anything but drawn at random."""
    found = []
    losses = {
        "balance.auxiliary_loss": config.balance.auxiliary_loss,
        "balance.z_loss": config.balance.z_loss,
        "router.entropy_loss": router.entropy_loss,
    }
    for key, value in losses.items():
        if value:
            rule = f"shapes scores that router.selection={router.selection} does not look at"
            found.append(Violation(key, value, rule, "set it to 0"))
    if router.groups != 1:
        rule = f"limits a token to some groups, which router.selection={router.selection} does not know"
        found.append(Violation(routing_key(config, "groups"), router.groups, rule, "set it to 1"))
    return found


def _quantile(config: Config, router: RouterConfig, experts: int) -> list[Violation]:
    if router.selection == "threshold":
        return []  # the combination is refused already
    found = []
    if router.top_k == experts:
        rule = f"gives each token all {experts} experts, so there is nothing to balance"
        remedy = f"use 1 to {experts - 1}, or balance.policy=none"
        found.append(Violation(routing_key(config, "top_k"), router.top_k, rule, remedy))
    if router.groups != 1:
        rule = "closes groups of experts to a token, which balance.policy=quantile does not foresee"
        remedy = "set it to 1, or balance.policy=loss_free"
        found.append(Violation(routing_key(config, "groups"), router.groups, rule, remedy))
    return found


def _fields_of_policies(config: Config) -> list[Violation]:
    """Fields that one policy alone reads, set away from their default under another."""
    balance = config.balance
    owners = {
        "applies_to": ("adaptive_weight",),
        "clip": ("adaptive_weight",),
        "form": ("loss_free",),
        "rule": ("loss_free", "adaptive_weight"),
        "freeze_at": ("loss_free", "adaptive_weight", "quantile"),
        "center": ("loss_free", "adaptive_weight", "quantile"),
    }
    found = []
    for name, policies in owners.items():
        value, default = getattr(balance, name), type(balance).model_fields[name].default
        if value != default and balance.policy not in policies:
            rule = f"has no meaning with balance.policy={balance.policy}"
            found.append(Violation(f"balance.{name}", value, rule, f"leave it out, or use {listed(policies)}"))
    if balance.policy == "quantile" and balance.center is False:
        rule = "lets the biases of balance.policy=quantile drift until margins can no longer be told apart"
        found.append(Violation("balance.center", False, rule, "leave it out"))
    if balance.policy == "auxiliary" and balance.auxiliary_loss == 0:
        rule = "leaves balance.policy=auxiliary without a loss"
        found.append(Violation("balance.auxiliary_loss", 0.0, rule, "give a coefficient above 0, such as 0.01"))
    return found
