"""The median and spread of rounds, and of the ratio of two programs that were measured in the same rounds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Half of the distance between the quartiles, relative to the median."""
        return (self.high - self.low) / 2 / self.median


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of one or more values.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("there are no values; measure at least one round")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def speed_ratio(seconds: Sequence[float], other_seconds: Sequence[float]) -> Spread:
    """Return how many times as fast the first program is as the other one, from the ratio of each round.

    A round measures both within seconds of each other, so that what slows the machine for a while slows both.

    Args:
        seconds: Of the program, for each round.
        other_seconds: Of the other one, for the same rounds.

    Raises:
        ValueError: The numbers of rounds differ, or are 0.
    """
    return spread([other / own for own, other in zip(seconds, other_seconds, strict=True)])
