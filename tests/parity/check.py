"""The checks: each trains cases and gives one row for each."""

import dataclasses
from collections.abc import Callable

from tests.dist.pool import RankPool
from tests.parity.case import OVER_MPI, POOL, Case
from tests.parity.reference import Reference, References
from tests.parity.report import Row
from tests.parity.setting import clipping
from tests.parity.trace import Trace, compare
from tests.parity.train import train, train_with_wrong_experts

Tell = Callable[[Row], None]


def check_pool(pool: RankPool, cases: list[Case], references: References, known: dict[Case, Trace], tell: Tell) -> None:
    """Train each case twice in the pool: as the reference within the tolerance, and twice the same bit for bit.

    known: traces of cases in the pool, here and below; a run that is there is not made again, one that is made is
    added.
    """
    for case in cases:
        reference = references[case]
        expected = pooled(pool, case, reference, known)
        again = train(pool, case, reference.seed)
        difference = compare(again.trace, reference.trace, clipping(case.routing))
        unequal = [f"{name} of two runs differ" for name in again.trace.unequal(expected)]
        tell(Row(case, "parity", difference, "a first run", difference.faults() + unequal, again.seconds))


def check_launched(
    pool: RankPool, cases: list[Case], references: References, known: dict[Case, Trace], tell: Tell
) -> None:
    """Train each case with its launcher: as the reference, and as the same layout in the pool bit for bit.

    Over MPI, twice the same bit for bit instead.
    """
    for case in cases:
        reference = references[case]
        trained = train(pool, case, reference.seed)
        difference = compare(trained.trace, reference.trace, clipping(case.routing))
        if case.start == OVER_MPI:
            other, expected = "a first run", train(pool, case, reference.seed).trace
        else:
            other, expected = "the pool", pooled(pool, dataclasses.replace(case, start=POOL), reference, known)
        unequal = [f"{name} differ from {other}" for name in trained.trace.unequal(expected)]
        tell(Row(case, "parity", difference, other, difference.faults() + unequal, trained.seconds))


def check_controls(pool: RankPool, cases: list[Case], references: References, tell: Tell) -> None:
    """Train each case with expert gradients times the degree: losses and norms must both break the rule."""
    for case in cases:
        reference = references[case]
        trained = train(pool, case, reference.seed, worker=train_with_wrong_experts)
        difference = compare(trained.trace, reference.trace, clipping(case.routing))
        found = " ".join(difference.faults())
        missed = [f"a wrong gradient is not seen in the {name}" for name in ("losses", "norms") if name not in found]
        what = f"control: expert gradients x {case.expert_parallel}"
        tell(Row(case, what, difference, "", missed, trained.seconds))


def check_checkpointing(
    pool: RankPool, cases: list[Case], references: References, known: dict[Case, Trace], tell: Tell
) -> None:
    """Train each case with activation checkpointing: as without it, bit for bit."""
    for case in cases:
        reference = references[case]
        expected = pooled(pool, case, reference, known)
        trained = train(pool, case, reference.seed, ("train.activation_checkpointing=true",))
        difference = compare(trained.trace, reference.trace, clipping(case.routing))
        unequal = [f"{name} differ from the run without" for name in trained.trace.unequal(expected)]
        faults = difference.faults() + unequal
        tell(Row(case, "activation checkpointing", difference, "without it", faults, trained.seconds))


def pooled(pool: RankPool, case: Case, reference: Reference, known: dict[Case, Trace]) -> Trace:
    """The trace of a case in the pool, from `known` or else trained now."""
    if case not in known:
        known[case] = train(pool, case, reference.seed).trace
    return known[case]
