"""The budget of threshold routing: a proportional-integral controller moves the threshold so that a token takes, on
average, as many experts as the budget says.

The number of experts grows with the threshold, steeply where the probabilities are level and slowly where they are
peaked. The controller therefore works on the threshold's logit, ln(p / (1 - p)), and on the relative error, which
makes one pair of gains serve both.
"""

import math
from typing import NamedTuple

PROPORTIONAL = 0.5
INTEGRAL = 0.25
LOWEST, HIGHEST = 0.001, 0.999


class Controller(NamedTuple):
    """The controller's state: the threshold in use, and the integral part of its logit."""

    threshold: float
    integral: float


def start_controller(threshold: float) -> Controller:
    """The state that begins with this threshold, between 0 and 1."""
    bounded = min(max(threshold, LOWEST), HIGHEST)
    return Controller(bounded, _logit(bounded))


def control(state: Controller, measured: float, budget: float) -> Controller:
    """The state after one step in which tokens took `measured` experts on average, where `budget` was wanted.

    logit(p) = integral + 0.5 * e with e = (budget - measured) / budget, and the integral grows by 0.25 * e. It stays
    within the logits of 0.001 and 0.999, so that it does not wind up where the budget cannot be met.
    """
    error = (budget - measured) / budget
    integral = min(max(state.integral + INTEGRAL * error, _logit(LOWEST)), _logit(HIGHEST))
    threshold = 1 / (1 + math.exp(-(integral + PROPORTIONAL * error)))
    return Controller(min(max(threshold, LOWEST), HIGHEST), integral)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
