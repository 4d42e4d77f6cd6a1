"""Every policy, as the tests of many ranks run it: on given logits, and in the small model."""

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.balancing.balancer import Balancer
from dist_moe.balancing.counts import RoutingCounts
from dist_moe.balancing.losses import RoutingLosses
from dist_moe.model.routing import count_record
from dist_moe.moe.router import Router
from dist_moe.moe.select import ExpertThreshold, RandomRouting, Rule, ThresholdRouting, TopK
from dist_moe.policies.adaptive_weight import AdaptiveWeight
from dist_moe.policies.base import Policy
from dist_moe.policies.ema_quantile import EmaQuantile
from dist_moe.policies.expert_threshold import ExpertThresholds
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.momentum import Momentum
from dist_moe.policies.quantile import Quantile, quantile_update
from dist_moe.policies.unbalanced import Unbalanced
from tests.dist.small import Case

CPU = torch.device("cpu")
SIGMOID = TopK(top_k=2, score="sigmoid", normalize=True, routed_scaling_factor=1.5)
SOFTMAX = TopK(top_k=2, score="softmax", normalize=True)
THRESHOLD = ThresholdRouting(threshold=0.3, max_experts=6)
EXPERT_THRESHOLD = ExpertThreshold(top_k=2, max_experts=12, min_experts=0, score="sigmoid")
EXPERTS = 12


POLICIES: dict[str, tuple[Rule, Policy, float | None]] = {
    "sign": (SIGMOID, LossFree(rate=0.05), None),
    "multiplicative": (
        TopK(2, "sigmoid", multiplicative=True),
        LossFree(rate=0.05, form="multiplicative"),
        None,
    ),
    "sqrt_softplus": (TopK(2, "sqrt_softplus"), LossFree(rate=0.05, center=True), None),
    "proportional on softmax": (SOFTMAX, LossFree(rate=0.05, rule="proportional"), None),
    "adaptive weight": (
        TopK(2, "softmax", bias_in_gate_weights=True),
        AdaptiveWeight(rate=0.05, clip=2.0, applies_to="gate_weights"),
        None,
    ),
    "threshold": (THRESHOLD, Unbalanced(), None),
    "threshold, adaptive weight": (THRESHOLD, AdaptiveWeight(rate=0.05), None),
    "threshold, target": (THRESHOLD, AdaptiveWeight(rate=0.05), 2.5),
    "quantile": (SIGMOID, Quantile(), None),
    "quantile on softmax": (SOFTMAX, Quantile(), None),
    "shares": (SIGMOID, LossFree(rate=0.05, rule="proportional", shares={"0": 0.2, "5": 0.05}), None),
    "momentum": (SIGMOID, Momentum(rate=0.05), None),
    "ema_quantile": (SIGMOID, EmaQuantile(decay=0.5), None),
    "expert_threshold": (EXPERT_THRESHOLD, ExpertThresholds(decay=0.5), None),
}
"""Name -> the rule of routing, the policy, and the experts that a token is to take on average."""


def case_of(name: str, **fields: object) -> Case:
    """The small model under a policy."""
    rule, policy, target = POLICIES[name]
    return Case(rule=rule, policy=policy, target_experts_per_token=target, **fields)  # type: ignore[arg-type]


def logits_of(step: int, layer: int) -> Tensor:
    """The logits of a global batch of 101 tokens, some experts preferred."""
    generator = torch.Generator().manual_seed(10 * step + layer)
    return torch.randn(101, EXPERTS, generator=generator) + torch.linspace(-1, 1, EXPERTS)


def given_logits(rank: int, world_size: int, name: str) -> tuple[list[list[RoutingCounts]], dict[str, object]]:
    """Five steps of two layers on logits that do not depend on the ranks, each with an uneven part of the tokens.

    -> the counts over all ranks of each step, and the state at the end. The router is real; its weight is the
    identity, so that what it is given are its logits.
    """
    rule, policy, target = POLICIES[name]
    routers = {f"layer.{layer}": Router(EXPERTS, EXPERTS, rule) for layer in range(2)}
    for router in routers.values():
        torch.nn.init.eye_(router.weight)
    balancer = Balancer(routers, policy, CPU, 100, target)
    cuts = [101 * index**2 // world_size**2 for index in range(world_size + 1)]
    seen = []
    for step in range(5):
        routing_counts = []
        for layer, router in enumerate(routers.values()):
            router.open_record(None)
            router(logits_of(step, layer)[cuts[rank] : cuts[rank + 1]])
            routing_counts.append(count_record(router, router.close_record(), policy.needs_margins))
        balancer.observe(routing_counts)
        seen.append(balancer.step())
    return seen, balancer.state_dict()


def mean_of_local_quantiles(rank: int, world_size: int) -> Tensor:
    """The bias that comes out where each rank takes the quantiles of its own tokens and the ranks average them."""
    router = Router(EXPERTS, EXPERTS, SIGMOID)
    torch.nn.init.eye_(router.weight)
    cuts = [101 * index**2 // world_size**2 for index in range(world_size + 1)]
    router.open_record(None)
    router(logits_of(0, 0)[cuts[rank] : cuts[rank + 1]])
    layer_counts = count_record(router, router.close_record(), needs_margins=True)
    assert layer_counts.margins_EQ is not None
    bias_E = quantile_update(router.selection_bias, layer_counts.margins_EQ, 2 / EXPERTS)
    dist.all_reduce(bias_E)
    return bias_E / world_size


LOSSES: dict[str, RoutingLosses] = {
    "sequence": RoutingLosses(balance=3.0, scope="sequence"),
    "global_batch": RoutingLosses(balance=3.0, scope="global_batch"),
    "z": RoutingLosses(z=0.3),
    "entropy": RoutingLosses(entropy=1.0),
    "orthogonality": RoutingLosses(orthogonality=0.02),
}
RANDOM_SELECTIONS = RandomRouting(top_k=2, zipf_exponent=1.0, score="softmax")
