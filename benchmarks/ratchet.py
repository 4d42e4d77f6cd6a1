"""Compares measured ratios with committed ones of the same kind of machine, and finds what became slower.

Only ratios of one run are compared, never times: the speed of a machine varies from hour to hour.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.results import Measured, Ratio, ratios

LEAST_TOLERANCE = 0.05
"""The relative change that is always accepted, though the rounds of a run differ less."""
MOST_TOLERANCE = 0.10
"""The largest relative change that is accepted; where the rounds differ more, two ratios cannot be compared."""


class Change(NamedTuple):
    """A ratio before and now.

    Attributes:
        before: The committed one.
        now: The measured one.
    """

    before: Ratio
    now: Ratio

    @property
    def noise(self) -> float:
        """The relative change that the spread of the rounds of both runs explains."""
        return self.before.speed.relative + self.now.speed.relative

    @property
    def noisy(self) -> bool:
        """Whether the rounds differ too much to compare the speeds."""
        return self.noise > MOST_TOLERANCE

    @property
    def tolerance(self) -> float:
        """The relative change that is accepted."""
        return min(MOST_TOLERANCE, max(LEAST_TOLERANCE, self.noise))

    @property
    def slower(self) -> bool:
        """Whether the program has become slower by more than the tolerance, in relation to the other one."""
        return not self.noisy and self.now.speed.median < self.before.speed.median * (1 - self.tolerance)

    @property
    def larger(self) -> bool:
        """Whether its peak memory has grown by more than LEAST_TOLERANCE, in relation to the other one."""
        before, now = self.before.memory, self.now.memory
        return before is not None and now is not None and now > before * (1 + LEAST_TOLERANCE)

    def __str__(self) -> str:
        where = f"{self.now.case}: {self.now.program} / {self.now.other}"
        text = f"{where}: {self.before.speed.median:.2f} -> {self.now.speed.median:.2f} times as fast"
        if self.noisy:
            text += f" (too noisy to compare: the rounds differ by {self.noise:.1%}, and may by {MOST_TOLERANCE:.0%})"
        else:
            text += f" (tolerance {self.tolerance:.0%})"
        if self.before.memory is not None and self.now.memory is not None:
            text += f", {self.before.memory:.2f} -> {self.now.memory:.2f} times its memory"
        return text


def compare(before: Iterable[Measured], now: Iterable[Measured]) -> list[Change]:
    """Return the change of each ratio that both have; the last one of `before` where it has several."""
    known = {key(ratio): ratio for record in before for ratio in ratios(record)}
    return [Change(known[key(ratio)], ratio) for record in now for ratio in ratios(record) if key(ratio) in known]


def missing(before: Sequence[Measured], now: Sequence[Measured]) -> list[str]:
    """Return one line for each committed ratio that has no value now, though its case names both programs now.

    `make bench-quick` names fewer programs in a case than `make bench`; the others are not missing.
    """
    named = {(record.case, row.name) for record in now for row in record.rows}
    have = {key(ratio) for record in now for ratio in ratios(record)}
    known = dict.fromkeys(key(ratio) for record in before for ratio in ratios(record))
    return [
        f"{case}: {program} / {other} was not measured"
        for case, program, other in known
        if {(case, program), (case, other)} <= named and (case, program, other) not in have
    ]


def key(ratio: Ratio) -> tuple[str, str, str]:
    """Return what two ratios have to share to be compared."""
    return ratio.case, ratio.program, ratio.other
