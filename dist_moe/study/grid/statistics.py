"""Statistics of a study: intervals, and differences between arms paired by seed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from dist_moe.study.grid.store import CellResult

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; without one for a single value.

    Attributes:
        mean: Of the values.
        half_width: Of the interval; None for a single value.
        values: What the mean was taken of.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    @property
    def low(self) -> float:
        """The lower limit; -inf for a single value."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper limit; inf for a single value."""
        return math.inf if self.half_width is None else self.mean + self.half_width

    def text(self, digits: int) -> str:
        """Format as `-0.31 ± 0.90`, a difference with its sign."""
        width = "" if self.half_width is None else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:+.{digits}f}{width}"


def interval(values: Sequence[float]) -> Interval:
    """Compute the 95 % confidence interval of a mean by Student's t distribution.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no values; an interval needs at least one")
    if len(values) == 1:
        return Interval(values[0], None, tuple(values))
    from scipy.stats import t

    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), tuple(values))


def interval_within_groups(groups: Sequence[Sequence[float]]) -> Interval:
    """Compute the 95 % confidence interval of the mean of group means, with the variance within groups pooled.

    Groups, such as tasks, are fixed: only their repetitions vary. With n values in each of G groups, Student's t
    distribution has G (n - 1) degrees of freedom.

    Raises:
        ValueError: There is no value.
    """
    present = [group for group in groups if group]
    if not present:
        raise ValueError("no values; an interval needs at least one")
    values = tuple(value for group in present for value in group)
    mean = fmean(fmean(group) for group in present)
    freedom = len(values) - len(present)
    if freedom == 0:
        return Interval(mean, None, values)
    from scipy.stats import t

    squares = math.fsum((value - fmean(group)) ** 2 for group in present for value in group)
    error = math.sqrt(squares / freedom * math.fsum(1 / len(group) for group in present)) / len(present)
    return Interval(mean, float(t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error, values)


def proportion_interval(proportion: float, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % confidence interval of a proportion.

    Args:
        proportion: In 0..1, such as an accuracy.
        count: Examples that it was measured on.
    """
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    middle = (proportion + z * z / (2 * count)) / (1 + z * z / count)
    width = z / (1 + z * z / count) * math.sqrt(proportion * (1 - proportion) / count + z * z / (4 * count * count))
    return middle - width, middle + width


class PairedExamples(NamedTuple):
    """Two runs compared by the examples that both have classified.

    Attributes:
        only_first, only_second: Examples that one of the runs alone has right.
        difference: Accuracy of the first minus that of the second.
        half_width: Of its 95 % interval (normal approximation for paired proportions).
        p_value: Of McNemar's test in its exact form: both runs are equally often right alone.
    """

    only_first: int
    only_second: int
    difference: float
    half_width: float
    p_value: float


def compare_examples(first: str, second: str, count: int) -> PairedExamples:
    """Compare two runs by example.

    Args:
        first, second: `EvaluationMetrics.correct_examples` of the same examples in the same order.
        count: Examples.

    Raises:
        ValueError: The runs have different numbers of examples, or there is none.
    """
    if len(first) != len(second) or not 0 < count <= 4 * len(first):
        raise ValueError(
            f"two runs with {4 * len(first)} and {4 * len(second)} bits of {count} examples; "
            "compare evaluations of the same examples"
        )
    from scipy.stats import binomtest, norm

    only_first = (int(first, 16) & ~int(second, 16)).bit_count()
    only_second = (int(second, 16) & ~int(first, 16)).bit_count()
    apart = only_first + only_second
    difference = (only_first - only_second) / count
    deviation = math.sqrt(max(0.0, apart / count - difference**2) / count)
    p_value = float(binomtest(only_first, apart).pvalue) if apart else 1.0
    return PairedExamples(
        only_first, only_second, difference, float(norm.ppf(0.5 + CONFIDENCE / 2)) * deviation, p_value
    )


class Results:
    """The results of a study, by case, arm and seed.

    Args:
        results: Of the finished cells.
    """

    def __init__(self, results: Iterable[CellResult]) -> None:
        self.all = list(results)
        self._by_key = {result.key: result for result in self.all}
        self.cases = list(dict.fromkeys(result.case for result in self.all))
        self.arms = list(dict.fromkeys(result.arm for result in self.all))

    def get(self, case: str, arm: str) -> list[CellResult]:
        """Return the results of all seeds."""
        return [result for result in self.all if (result.case, result.arm) == (case, arm)]

    def values(self, case: str, arm: str, name: str) -> list[float]:
        """Return a measure of all seeds that have it."""
        found = [result.values.get(name) for result in self.get(case, arm)]
        return [value for value in found if value is not None]

    def pairs(self, case: str, arm: str, other: str, name: str) -> dict[int, tuple[float, float]]:
        """Return a measure of two arms by seed, of the seeds that have it in both."""
        found = {}
        for result in self.get(case, arm):
            partner = self._by_key.get((case, other, result.seed))
            first, second = result.values.get(name), None if partner is None else partner.values.get(name)
            if first is not None and second is not None:
                found[result.seed] = (first, second)
        return found

    def differences(self, arm: str, other: str, name: str, cases: Sequence[str] | None = None) -> list[float]:
        """Return arm minus other, by seed: the mean over the cases, of the seeds that have both arms in each case.

        Seeds are the repetitions: the cases of one seed are not independent measurements of the arm. A case in which no
        seed has both arms is left out.
        """
        found = [self.pairs(case, arm, other, name) for case in (self.cases if cases is None else cases)]
        present = [pairs for pairs in found if pairs]
        seeds = set.intersection(*(set(pairs) for pairs in present)) if present else set()
        return [fmean(pairs[seed][0] - pairs[seed][1] for pairs in present) for seed in sorted(seeds)]

    def ratios(self, case: str, numerator: str, denominator: str, name: str) -> dict[int, float]:
        """Return numerator / denominator of a measure by seed."""
        pairs = self.pairs(case, numerator, denominator, name)
        return {seed: first / second for seed, (first, second) in pairs.items() if second}
