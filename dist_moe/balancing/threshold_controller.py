"""A proportional-integral controller of the threshold, for a given average number of experts per token.

The number of experts grows with the threshold: steeply where the probabilities of a token are nearly equal, hardly at
all where they are peaked. So no fixed pair of gains fits. The controller works on the threshold's logit,
ln(p / (1 - p)), and on the relative error; both gains are multiplied by a factor that falls when the error changes its
sign (oscillation) and grows while it keeps its sign (slow convergence). Errors of a few percent are within the noise
of a batch's mean, and do not change the factor by their sign.
"""

import math
from typing import NamedTuple

PROPORTIONAL = 0.5
INTEGRAL = 0.5
GAIN_DECREASE, GAIN_INCREASE = 0.5, 1.2
OSCILLATION_ERROR, SLOW_ERROR = 0.05, 0.01  # errors above which the factor changes
MIN_GAIN, MAX_GAIN = 0.05, 8.0
MIN_THRESHOLD, MAX_THRESHOLD = 0.001, 0.999


class Controller(NamedTuple):
    """The controller's state.

    Attributes:
        threshold: The current threshold.
        integral: The integral part of its logit.
        gain: The factor on both gains.
        error: The relative error of the last step.
    """

    threshold: float
    integral: float
    gain: float
    error: float


def start_controller(threshold: float) -> Controller:
    """The initial state for an initial threshold between 0 and 1."""
    bounded = min(max(threshold, MIN_THRESHOLD), MAX_THRESHOLD)
    return Controller(bounded, _logit(bounded), 1.0, 0.0)


def control(state: Controller, measured: float, target: float) -> Controller:
    """Compute the state after one step.

    With e = (target - measured) / target and the gain g: the integral grows by g * 0.5 * e, and
    logit(p) = integral + g * 0.5 * e. Both are kept within the logits of 0.001 and 0.999, so that the integral does
    not wind up where the target cannot be reached.

    Args:
        state: The state before the step.
        measured: Experts a token took on average in the step.
        target: Experts a token is to take on average.
    """
    error = (target - measured) / target
    gain = state.gain
    if error * state.error < 0 and abs(error) > OSCILLATION_ERROR:
        gain = max(gain * GAIN_DECREASE, MIN_GAIN)
    elif error * state.error > 0 and abs(error) > SLOW_ERROR:
        gain = min(gain * GAIN_INCREASE, MAX_GAIN)
    integral = _bounded(state.integral + gain * INTEGRAL * error)
    logit = _bounded(integral + gain * PROPORTIONAL * error)
    return Controller(1 / (1 + math.exp(-logit)), integral, gain, error)


def _bounded(logit: float) -> float:
    return min(max(logit, _logit(MIN_THRESHOLD)), _logit(MAX_THRESHOLD))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
