"""What the study of controllers reads off a series of loads: steps, ripple, and how many steps theory predicts.

Shapes: T tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev

import torch
from torch import Tensor

from dist_moe.balance.rules.quantile import count_margins, quantile_update

WINDOW = 9
"""The steps over which a median is taken, so that one lucky step does not count as level."""
NEAR = 1.5
"""Near the floor is at most this many times the floor."""
TOLERANCE = 0.02
"""At the floor is at most this much above it."""


@dataclass(frozen=True)
class Stretch:
    """The steps from a beginning or from a shift on; None where a level was not reached, or nothing is predicted.

    near: steps to 1.5 times the floor. at: steps to the floor + 0.02. predicted: of the sign rule, to equal loads.
    """

    near: int | None
    at: int | None
    predicted: float | None


@dataclass(frozen=True)
class Measures:
    """One contender in one series of scores.

    floor: MaxVio of its selection over the same noise without offsets, mean of all steps. start, shift: the two
    stretches. ripple, ripple_std: MaxVio - floor over the last quarter of the steps before the shift, mean and
    standard deviation. experts_first, experts_steady: experts a token took in the first step, and in that quarter.
    """

    floor: float
    start: Stretch
    shift: Stretch
    ripple: float
    ripple_std: float
    experts_first: float
    experts_steady: float


def measure(
    max_vio: Sequence[float],
    experts_a_token: Sequence[float],
    floor: float,
    shift_at: int,
    predicted: tuple[float | None, float | None],
) -> Measures:
    """The measures of one series; `shift_at`: the step of the shift, counted from 0."""
    before, after = max_vio[:shift_at], max_vio[shift_at:]
    steady = slice(shift_at - max(2, shift_at // 4), shift_at)
    excess = [value - floor for value in max_vio[steady]]
    return Measures(
        floor,
        _stretch(before, floor, predicted[0]),
        _stretch(after, floor, predicted[1]),
        fmean(excess),
        pstdev(excess),
        experts_a_token[0],
        fmean(experts_a_token[steady]),
    )


def steps_to_reach(series: Sequence[float], level: float, window: int = WINDOW) -> int | None:
    """The least n with series[n] and the median of series[n : n + window] at most `level`; None where there is none.

    series[n] is measured after n updates, so n is a number of updates.
    """
    starts = range(len(series) - window + 1)
    return next((n for n in starts if max(series[n], median(series[n : n + window])) <= level), None)


def sign_steps(distance_E: Tensor, rate: float) -> float:
    """The steps that the sign rule needs for these changes of the biases, (greatest - least) / (2 rate).

    The bias that has to rise most goes up by the rate in every step and the one that has to fall most goes down by
    it, so their distance shrinks by twice the rate. A shift common to all biases changes no selection.
    """
    return float(distance_E.max() - distance_E.min()) / (2 * rate)


def balancing_bias(batches: Sequence[Tensor], top_k: int, rounds: int = 8) -> Tensor:
    """The bias with which each expert receives its share of these scores -> fp32 [E], of mean 0.

    batches: [T, E] each, in the space in which the bias is added. It repeats the quantile rule on them.
    """
    experts = batches[0].shape[1]
    bias_E = torch.zeros(experts)
    for _ in range(rounds):
        margins_EQ = torch.stack([count_margins(scores_TE, bias_E, top_k) for scores_TE in batches]).sum(dim=0)
        bias_E = quantile_update(bias_E, margins_EQ, top_k / experts)
    return bias_E


def _stretch(series: Sequence[float], floor: float, predicted: float | None) -> Stretch:
    return Stretch(steps_to_reach(series, NEAR * floor), steps_to_reach(series, floor + TOLERANCE), predicted)
