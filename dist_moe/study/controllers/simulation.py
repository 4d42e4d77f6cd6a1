"""The study of controllers: how fast and how steadily each balancing policy brings the load to level, without a model.

Every policy sees the same random scores, whose experts are unequal, drift, and are drawn anew at a shift. The policy
`auxiliary` is left out: it works by gradients, and here is nothing to train. Shapes: T tokens, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.balance.load import max_vio_floor
from dist_moe.errors import UserError
from dist_moe.study.contenders import CONTENDERS, LEVEL, Contender, Course
from dist_moe.study.measures import Measures, balancing_bias, measure, sign_steps
from dist_moe.study.scores import Drift, draw_scores, random_source
from dist_moe.text import listed

PREDICTION_TOKENS = 4096


@dataclass(frozen=True)
class Size:
    """A layer: E experts, K a token, and T tokens a step.

    threshold_tokens: tokens a step under threshold routing, which here takes more experts a token than K where there
    are many; chosen so that the assignments, and with them the floor, are about as many.
    """

    experts: int
    top_k: int
    tokens: int
    threshold_tokens: int

    @property
    def floor(self) -> float:
        """MaxVio that `max_vio_floor` expects of uniform draws."""
        return max_vio_floor(self.experts, self.tokens * self.top_k)


SIZES = (Size(8, 2, 4096, 4096), Size(64, 6, 2048, 2048), Size(256, 8, 1024, 512), Size(896, 8, 1024, 128))


@dataclass(frozen=True)
class Plan:
    """What is run. before, after: steps before and after the shift. seeds: 0 to seeds - 1."""

    sizes: tuple[Size, ...] = SIZES
    seeds: int = 3
    before: int = 150
    after: int = 220
    drift: Drift = field(default_factory=Drift)


class Run(NamedTuple):
    """One contender over one size and seed; max_vio: of each step."""

    experts: int
    seed: int
    contender: Contender
    measures: Measures
    max_vio: list[float]


def make_plan(experts: Sequence[int] = (), seeds: int = 3, quick: bool = False) -> Plan:
    """The plan for these numbers of experts, all of them if none is given.

    quick: few steps of few tokens, and 8 experts alone unless told. Errors: UserError for a number of experts
    without a size.
    """
    known = {size.experts: size for size in SIZES}
    unknown = [count for count in experts if count not in known]
    if unknown:
        raise UserError(f"experts={listed(unknown, 'and')} is no size of this study; use {listed(known)}")
    asked = dict.fromkeys(experts) or ([8] if quick else known)
    sizes = tuple(known[count] for count in asked)
    if not quick:
        return Plan(sizes, seeds)
    fewer = (replace(size, tokens=size.tokens // 2, threshold_tokens=size.threshold_tokens // 2) for size in sizes)
    return Plan(tuple(fewer), seeds, before=30, after=30)


def run_plan(plan: Plan, tell: Callable[[str], None]) -> list[Run]:
    """All runs, by size, seed and contender; `tell` is given a line for each size and seed."""
    runs = []
    for size in plan.sizes:
        for seed in range(plan.seeds):
            began = perf_counter()
            runs += run_contenders(plan, size, seed)
            tell(f"{size.experts} experts, seed {seed}: {perf_counter() - began:.0f} s")
    return runs


def run_contenders(plan: Plan, size: Size, seed: int) -> list[Run]:
    """Every contender over the same scores."""
    courses = [Course(contender, size.experts, size.top_k) for contender in (*LEVEL, *CONTENDERS)]
    steps = plan.before + plan.after
    predicted: list[dict[str, float]] = []
    for step, drawn in enumerate(draw_scores(plan.drift, size.experts, size.tokens, steps, plan.before, seed)):
        if step in (0, plan.before):
            predicted.append(predict(courses, drawn.offset_E, plan.drift, size, seed))
        logits_TE = drawn.logits_TE
        for course in courses:
            shown_TE = drawn.noise_TE if course.contender.level else logits_TE
            course.step(shown_TE[: size.threshold_tokens] if course.contender.by_threshold else shown_TE)
    floors = {course.contender.by_threshold: fmean(course.max_vio) for course in courses if course.contender.level}
    runs = []
    for course in courses:
        contender = course.contender
        if not contender.level:
            expected = (predicted[0].get(contender.name), predicted[1].get(contender.name))
            floor = floors[contender.by_threshold]
            measures = measure(course.max_vio, course.experts_a_token, floor, plan.before, expected)
            runs.append(Run(size.experts, seed, contender, measures, course.max_vio))
    return runs


def predict(courses: Sequence[Course], offset_E: Tensor, drift: Drift, size: Size, seed: int) -> dict[str, float]:
    """The steps that each sign rule should need from where its bias is, by name, if the offsets stood still."""
    source = random_source(seed, size.experts, 2)
    shape = (size.tokens, size.experts)
    batches = [
        torch.randn(shape, generator=source) * drift.noise_std + offset_E
        for _ in range(max(1, PREDICTION_TOKENS // size.tokens))
    ]
    goals: dict[bool, Tensor] = {}
    steps = {}
    for course in courses:
        contender = course.contender
        if contender.by_sign:
            if contender.multiplicative not in goals:
                spaces = [contender.biased_space(logits_TE) for logits_TE in batches]
                goals[contender.multiplicative] = balancing_bias(spaces, size.top_k)
            steps[contender.name] = sign_steps(goals[contender.multiplicative] - course.bias_E, contender.rate)
    return steps
