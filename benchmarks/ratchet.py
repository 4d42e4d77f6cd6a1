"""Compares measured ratios with committed ones of the same kind of machine, and finds what became slower.

Only ratios of one run are compared, never times: the speed of a machine varies from hour to hour.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.results import Measured, Ratio, ratios

LEAST_TOLERANCE = 0.05
"""The relative change that is always accepted, though the rounds of a run differ less."""


class Change(NamedTuple):
    """A ratio before and now.

    Attributes:
        before: The committed one.
        now: The measured one.
        tolerance: The relative change that the spread of both runs explains, at least LEAST_TOLERANCE.
    """

    before: Ratio
    now: Ratio
    tolerance: float

    @property
    def slower(self) -> bool:
        """Whether the program has become slower than the tolerance explains, in relation to the other one."""
        return self.now.speed.median < self.before.speed.median * (1 - self.tolerance)

    @property
    def larger(self) -> bool:
        """Whether its peak memory has grown by more than LEAST_TOLERANCE, in relation to the other one."""
        before, now = self.before.memory, self.now.memory
        return before is not None and now is not None and now > before * (1 + LEAST_TOLERANCE)

    def __str__(self) -> str:
        where = f"{self.now.case}: {self.now.program} / {self.now.other}"
        text = f"{where}: {self.before.speed.median:.2f} -> {self.now.speed.median:.2f} times as fast"
        text += f" (tolerance {self.tolerance:.0%})"
        if self.before.memory is not None and self.now.memory is not None:
            text += f", {self.before.memory:.2f} -> {self.now.memory:.2f} times its memory"
        return text


def compare(before: Iterable[Measured], now: Iterable[Measured]) -> list[Change]:
    """Return the change of each ratio that both have."""
    known = {key(ratio): ratio for record in before for ratio in ratios(record)}
    return [
        Change(known[key(ratio)], ratio, tolerance(known[key(ratio)], ratio))
        for record in now
        for ratio in ratios(record)
        if key(ratio) in known
    ]


def missing(before: Sequence[Measured], now: Sequence[Measured]) -> list[str]:
    """Return what of the committed ratios of these cases was not measured, one line each."""
    cases = {record.case for record in now}
    have = {key(ratio) for record in now for ratio in ratios(record)}
    lost = [ratio for record in before if record.case in cases for ratio in ratios(record) if key(ratio) not in have]
    return [f"{ratio.case}: {ratio.program} / {ratio.other} was not measured" for ratio in lost]


def tolerance(before: Ratio, now: Ratio) -> float:
    """Return the relative change of a ratio that the spread of the rounds explains."""
    return max(LEAST_TOLERANCE, before.speed.relative + now.speed.relative)


def key(ratio: Ratio) -> tuple[str, str, str]:
    """Return what two ratios have to share to be compared."""
    return ratio.case, ratio.program, ratio.other
