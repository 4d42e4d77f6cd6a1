"""The budget of threshold routing: a proportional-integral controller moves the threshold so that a token takes, on
average, as many experts as the budget says.

The number of experts grows with the threshold: steeply where the probabilities of many tokens are alike, hardly at
all where they are peaked. So no pair of gains serves everywhere. The controller works on the threshold's logit,
ln(p / (1 - p)), and on the relative error; both gains are multiplied by a factor that falls when the error jumps from
one side to the other, which is a swing, and grows while it stays on one side, which is slowness. Errors of a few per
cent are what chance does to the mean of a batch, and change no gain by changing their sign.
"""

import math
from typing import NamedTuple

PROPORTIONAL = 0.5
INTEGRAL = 0.5
FALL, GROWTH = 0.5, 1.2
SWING, SLOWNESS = 0.05, 0.01  # errors from which on the factor changes
LEAST_GAIN, GREATEST_GAIN = 0.05, 8.0
LOWEST, HIGHEST = 0.001, 0.999


class Controller(NamedTuple):
    """The controller's state: the threshold in use, the integral part of its logit, the factor on both gains, and
    the relative error of the last step.
    """

    threshold: float
    integral: float
    gain: float
    error: float


def start_controller(threshold: float) -> Controller:
    """The state that begins with this threshold, between 0 and 1."""
    bounded = min(max(threshold, LOWEST), HIGHEST)
    return Controller(bounded, _logit(bounded), 1.0, 0.0)


def control(state: Controller, measured: float, budget: float) -> Controller:
    """The state after one step in which tokens took `measured` experts on average, where `budget` was wanted.

    With e = (budget - measured) / budget and the gain g: the integral grows by g * 0.5 * e, and
    logit(p) = integral + g * 0.5 * e. Both stay within the logits of 0.001 and 0.999, so that nothing winds up where
    the budget cannot be met.
    """
    error = (budget - measured) / budget
    gain = state.gain
    if error * state.error < 0 and abs(error) > SWING:
        gain = max(gain * FALL, LEAST_GAIN)
    elif error * state.error > 0 and abs(error) > SLOWNESS:
        gain = min(gain * GROWTH, GREATEST_GAIN)
    integral = _bounded(state.integral + gain * INTEGRAL * error)
    logit = _bounded(integral + gain * PROPORTIONAL * error)
    return Controller(1 / (1 + math.exp(-logit)), integral, gain, error)


def _bounded(logit: float) -> float:
    return min(max(logit, _logit(LOWEST)), _logit(HIGHEST))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
