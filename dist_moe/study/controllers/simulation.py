"""The runs of the study of controllers: every policy routes the same random scores, and its MaxVio is measured.

The experts of the scores are unequal, drift, and are drawn again at a shift. The policy `auxiliary` is not included: it
acts through gradients, and this study trains no model. Shapes: T tokens, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.balancing.load import max_vio_floor
from dist_moe.errors import UserError
from dist_moe.study.controllers.measures import Measures, balancing_bias, measure, sign_steps
from dist_moe.study.controllers.scores import Drift, draw_scores, random_source
from dist_moe.study.controllers.variants import REFERENCES, VARIANTS, PolicySimulation, PolicyVariant
from dist_moe.text import listed

PREDICTION_TOKENS = 4096


@dataclass(frozen=True)
class LayerSize:
    """The size of a layer and of its batches.

    Attributes:
        experts: E.
        top_k: Experts per token.
        tokens: T of each step.
        threshold_tokens: T of each step under threshold routing, which here takes more experts per token than top-K
            if there are many; chosen for about as many assignments, and thus the same floor.
    """

    experts: int
    top_k: int
    tokens: int
    threshold_tokens: int

    @property
    def floor(self) -> float:
        """MaxVio under uniform random routing, by formula."""
        return max_vio_floor(self.experts, self.tokens * self.top_k)


SIZES = (
    LayerSize(8, 2, 4096, 4096),
    LayerSize(64, 6, 2048, 2048),
    LayerSize(256, 8, 1024, 512),
    LayerSize(896, 8, 1024, 128),
)


@dataclass(frozen=True)
class Plan:
    """What the study runs.

    Attributes:
        sizes: Of the layers.
        seeds: Number of seeds, from 0.
        before: Steps before the shift.
        after: Steps after the shift.
        drift: Distribution of the scores.
    """

    sizes: tuple[LayerSize, ...] = SIZES
    seeds: int = 3
    before: int = 150
    after: int = 220
    drift: Drift = field(default_factory=Drift)


class Run(NamedTuple):
    """One policy on one layer size and seed; max_vio is that of each step."""

    experts: int
    seed: int
    variant: PolicyVariant
    measures: Measures
    max_vio: list[float]


def make_plan(experts: Sequence[int] = (), seeds: int = 3, quick: bool = False) -> Plan:
    """Plan the study.

    Args:
        experts: Numbers of experts to include; empty for all, or for 8 with `quick`.
        seeds: Number of seeds.
        quick: Run few steps of few tokens.

    Raises:
        UserError: There is no layer size with such a number of experts.
    """
    by_experts = {size.experts: size for size in SIZES}
    unknown = [count for count in experts if count not in by_experts]
    if unknown:
        raise UserError(f"experts={listed(unknown, 'and')} is no size of this study; use {listed(by_experts)}")
    requested = dict.fromkeys(experts) or ([8] if quick else by_experts)
    sizes = tuple(by_experts[count] for count in requested)
    if not quick:
        return Plan(sizes, seeds)
    smaller = (replace(size, tokens=size.tokens // 2, threshold_tokens=size.threshold_tokens // 2) for size in sizes)
    return Plan(tuple(smaller), seeds, before=30, after=30)


def run_plan(plan: Plan, log: Callable[[str], None]) -> list[Run]:
    """Run the study -> the runs by size, seed and policy. `log` receives a line for each size and seed."""
    runs = []
    for size in plan.sizes:
        for seed in range(plan.seeds):
            began = perf_counter()
            runs += run_variants(plan, size, seed)
            log(f"{size.experts} experts, seed {seed}: {perf_counter() - began:.0f} s")
    return runs


def run_variants(plan: Plan, size: LayerSize, seed: int) -> list[Run]:
    """Run every policy on the same scores."""
    simulations = [
        PolicySimulation(variant, size.experts, size.top_k, plan.drift.noise_std)
        for variant in (*REFERENCES, *VARIANTS)
    ]
    steps = plan.before + plan.after
    predicted: list[dict[str, float]] = []
    for step, scores in enumerate(draw_scores(plan.drift, size.experts, size.tokens, steps, plan.before, seed)):
        if step in (0, plan.before):
            predicted.append(predict_steps(simulations, scores.offset_E, plan.drift, size, seed))
        logits_TE = scores.logits_TE
        for simulation in simulations:
            input_TE = scores.noise_TE if simulation.variant.without_offsets else logits_TE
            tokens = size.threshold_tokens if simulation.variant.selection == "threshold" else size.tokens
            simulation.step(input_TE[:tokens])
    floors = {
        simulation.variant.selection: fmean(simulation.max_vio)
        for simulation in simulations
        if simulation.variant.without_offsets
    }
    runs = []
    for simulation in simulations:
        variant = simulation.variant
        if not variant.without_offsets:
            expected = (predicted[0].get(variant.name), predicted[1].get(variant.name))
            floor = floors[variant.selection]
            if simulation.shares is not None:
                floor = max_vio_floor(size.experts, size.tokens * size.top_k, simulation.shares)
            measures = measure(simulation.max_vio, simulation.experts_per_token, floor, plan.before, expected)
            runs.append(Run(size.experts, seed, variant, measures, simulation.max_vio))
    return runs


def predict_steps(
    simulations: Sequence[PolicySimulation], offset_E: Tensor, drift: Drift, size: LayerSize, seed: int
) -> dict[str, float]:
    """Predict the steps that each sign rule needs from its current bias if the offsets stay constant, by name."""
    source = random_source(seed, size.experts, 2)
    shape = (size.tokens, size.experts)
    batches = [
        torch.randn(shape, generator=source) * drift.noise_std + offset_E
        for _ in range(max(1, PREDICTION_TOKENS // size.tokens))
    ]
    targets: dict[bool, Tensor] = {}
    steps = {}
    for simulation in simulations:
        variant = simulation.variant
        if variant.is_sign_rule:
            multiplicative = variant.policy.bias_multiplies_scores
            if multiplicative not in targets:
                spaces = [variant.biased_space(logits_TE) for logits_TE in batches]
                targets[multiplicative] = balancing_bias(spaces, size.top_k)
            steps[variant.name] = sign_steps(targets[multiplicative] - simulation.bias_E, variant.policy.rate)
    return steps
