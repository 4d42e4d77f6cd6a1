"""Measures of a series of MaxVio: steps to convergence, ripple, and the steps that theory predicts.

Shapes: T tokens, E experts, Q bins of the margin histogram.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev

import torch
from torch import Tensor

from dist_moe.balancing.margins import count_margins
from dist_moe.policies.quantile import quantile_update

WINDOW = 9
"""Steps of the median, so that a single lucky step does not count as balanced."""
NEAR = 1.5
"""MaxVio is near the floor at up to this many times the floor."""
TOLERANCE = 0.02
"""MaxVio is at the floor at up to this much above it."""


@dataclass(frozen=True)
class Convergence:
    """Steps to convergence, counted from the start or from the shift; None if not reached, or not predicted.

    Attributes:
        near: Steps to 1.5 times the floor.
        at_floor: Steps to the floor + 0.02.
        predicted: Steps to equal loads that theory predicts for the sign rule.
    """

    near: int | None
    at_floor: int | None
    predicted: float | None


@dataclass(frozen=True)
class Measures:
    """Measures of one policy on one series of scores.

    Attributes:
        floor: MaxVio of its selection on the same noise without offsets, mean over all steps.
        start: Convergence from the start.
        shift: Convergence from the shift.
        ripple: Mean of MaxVio - floor over the last quarter of the steps before the shift.
        ripple_std: Its standard deviation over the same steps.
        experts_first: Experts per token in the first step.
        experts_steady: Experts per token over the last quarter of the steps before the shift.
    """

    floor: float
    start: Convergence
    shift: Convergence
    ripple: float
    ripple_std: float
    experts_first: float
    experts_steady: float


def measure(
    max_vio: Sequence[float],
    experts_per_token: Sequence[float],
    floor: float,
    shift_at: int,
    predicted: tuple[float | None, float | None],
) -> Measures:
    """Measure one series.

    Args:
        max_vio: Of each step.
        experts_per_token: Of each step.
        floor: MaxVio without offsets.
        shift_at: Step of the shift, counted from 0.
        predicted: Steps that theory predicts from the start and from the shift; None if it does not.
    """
    before, after = max_vio[:shift_at], max_vio[shift_at:]
    steady = slice(shift_at - max(2, shift_at // 4), shift_at)
    excess = [value - floor for value in max_vio[steady]]
    return Measures(
        floor,
        _convergence(before, floor, predicted[0]),
        _convergence(after, floor, predicted[1]),
        fmean(excess),
        pstdev(excess),
        experts_per_token[0],
        fmean(experts_per_token[steady]),
    )


def steps_to_reach(series: Sequence[float], level: float, window: int = WINDOW) -> int | None:
    """Return the smallest n for which series[n] and the median of series[n : n + window] are at most `level`.

    series[n] is measured after n updates, so n is a number of updates. None if there is no such n.
    """
    starts = range(len(series) - window + 1)
    return next((n for n in starts if max(series[n], median(series[n : n + window])) <= level), None)


def sign_steps(distance_E: Tensor, rate: float) -> float:
    """Return the steps that the sign rule needs for these changes of the biases, (largest - smallest) / (2 rate).

    In every step the bias with the largest required increase rises by the rate and the one with the largest required
    decrease falls by it, so their distance shrinks by twice the rate. A shift of all biases changes no selection.
    """
    return float(distance_E.max() - distance_E.min()) / (2 * rate)


def balancing_bias(batches: Sequence[Tensor], top_k: int, rounds: int = 8) -> Tensor:
    """Find the bias that gives every expert its share of these scores, by repeating the quantile rule.

    Args:
        batches: Tensors [T, E], in the space to which the bias is added.
        top_k: Experts per token.
        rounds: Repetitions.

    Returns:
        fp32 [E], with mean 0.
    """
    experts = batches[0].shape[1]
    bias_E = torch.zeros(experts)
    for _ in range(rounds):
        margins_EQ = torch.stack([count_margins(scores_TE, bias_E, top_k) for scores_TE in batches]).sum(dim=0)
        bias_E = quantile_update(bias_E, margins_EQ, top_k / experts)
    return bias_E


def _convergence(series: Sequence[float], floor: float, predicted: float | None) -> Convergence:
    return Convergence(steps_to_reach(series, NEAR * floor), steps_to_reach(series, floor + TOLERANCE), predicted)
