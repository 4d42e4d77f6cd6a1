"""Claims of a study: what is asserted, whether the results support it, and by which numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dist_moe.study.grid.statistics import Interval, Results, interval, interval_within_groups
from dist_moe.text import counted

Verdict = Literal["does not hold", "not resolved", "holds", "not measured"]
NO_PAIR = "no seed has finite results of both arms"
ORDER: tuple[Verdict, ...] = ("does not hold", "not resolved", "not measured", "holds")


class Measure(NamedTuple):
    """A measure of the results.

    Attributes:
        name: In `CellResult.values`.
        digits: After the decimal point.
        unit: After the value, with a space.
        factor: By which the value is multiplied, such as 100 for percent.
    """

    name: str
    digits: int
    unit: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: What is asserted.
        verdict: Whether the results support it.
        evidence: The numbers.
    """

    text: str
    verdict: Verdict
    evidence: str


def lower_by_factor(
    results: Results, text: str, case: str, arm: str, other: str, measure: Measure, factor: float
) -> Claim:
    """Claim that a measure of `arm` is at least `factor` times lower than that of `other`, for each seed."""
    ratios = results.ratios(case, other, arm, measure.name)
    if not ratios:
        return Claim(text, "not measured", NO_PAIR)
    pairs = results.pairs(case, other, arm, measure.name)
    by_seed = ", ".join(f"{ratio:.1f}" for ratio in ratios.values())
    absolute = ", ".join(f"{first:.3g} to {second:.3g}{measure.unit}" for first, second in pairs.values())
    verdict: Verdict = "does not hold" if min(ratios.values()) < factor else _if_repeated(len(ratios))
    return Claim(text, verdict, f"factors {by_seed} by seed (from {absolute})")


def difference_below(results: Results, text: str, arm: str, other: str, measure: Measure, limit: float) -> Claim:
    """Claim that arm - other is below `limit`; see `judge`."""
    found = [measure.factor * value for value in results.differences(arm, other, measure.name)]
    return judge(text, found, measure, limit)


def judge(text: str, differences: Sequence[float], measure: Measure, limit: float = 0.0) -> Claim:
    """Claim that differences, one per seed, are below `limit`: resolved where their 95 % interval is on one side."""
    if not differences:
        return Claim(text, "not measured", NO_PAIR)
    found = interval(differences)
    verdict: Verdict = "not resolved"
    if found.half_width is not None and found.high < limit:
        verdict = "holds"
    elif found.half_width is not None and found.low >= limit:
        verdict = "does not hold"
    return Claim(text, verdict, _difference_text(found, measure))


def equal_within(results: Results, text: str, arm: str, other: str, measure: Measure, margin: float) -> Claim:
    """Claim that two arms differ by less than `margin`: resolved where the 95 % interval is within or beyond it."""
    found = [measure.factor * value for value in results.differences(arm, other, measure.name)]
    if not found:
        return Claim(text, "not measured", NO_PAIR)
    difference = interval(found)
    return Claim(text, _within(difference, margin), _difference_text(difference, measure))


def equal_within_cases(results: Results, text: str, arm: str, other: str, measure: Measure, margin: float) -> Claim:
    """As `equal_within`, for the mean over fixed cases, with the variance over seeds pooled within the cases."""
    pairs = [results.pairs(case, arm, other, measure.name) for case in results.cases]
    groups = [[measure.factor * (first - second) for first, second in by_seed.values()] for by_seed in pairs]
    if not any(groups):
        return Claim(text, "not measured", NO_PAIR)
    difference = interval_within_groups(groups)
    by_case = "; ".join(
        f"{case} {', '.join(f'{value:+.{measure.digits}f}' for value in group)}"
        for case, group in zip(results.cases, groups, strict=True)
        if group
    )
    how = "with one seed" if difference.half_width is None else "95 % interval; by seed"
    evidence = f"{difference.text(measure.digits)}{measure.unit} ({how}: {by_case})"
    return Claim(text, _within(difference, margin), evidence)


def _within(difference: Interval, margin: float) -> Verdict:
    """Whether a 95 % interval is within a margin, or beyond it."""
    if -margin < difference.low and difference.high < margin:
        return "holds"
    return "does not hold" if difference.low > margin or difference.high < -margin else "not resolved"


def below(results: Results, text: str, arm: str, measure: Measure, limit: float) -> Claim:
    """Claim that a measure is below `limit` in every case and with every seed."""
    values = [measure.factor * value for case in results.cases for value in results.values(case, arm, measure.name)]
    if not values:
        return Claim(text, "not measured", "the arm has no result")
    verdict: Verdict = "does not hold" if max(values) >= limit else _if_repeated(len(values))
    low, high = (f"{value:.{measure.digits}f}" for value in (min(values), max(values)))
    return Claim(text, verdict, f"{low} to {high}{measure.unit} in {counted(len(values), 'run')}")


def _if_repeated(count: int) -> Verdict:
    """The verdict of what holds in `count` runs: one run resolves nothing."""
    return "holds" if count > 1 else "not resolved"


def _difference_text(difference: Interval, measure: Measure) -> str:
    seeds = ", ".join(f"{value:+.{measure.digits}f}" for value in difference.values)
    if difference.half_width is None:
        return f"{seeds}{measure.unit} with one seed"
    return f"{difference.text(measure.digits)}{measure.unit} (95 % interval; by seed {seeds})"


def claim_lines(claims: Iterable[Claim]) -> list[str]:
    """Format the claims as Markdown, grouped by verdict; what does not hold comes first."""
    grouped: Sequence[Claim] = list(claims)
    lines: list[str] = []
    for verdict in ORDER:
        if members := [claim for claim in grouped if claim.verdict == verdict]:
            lines += [f"**{verdict.capitalize()}**", ""]
            lines += [f"- {claim.text}: {claim.evidence}." for claim in members]
            lines.append("")
    return lines
