"""The reference of each optimizer and routing: one worker, with a seed under which no routing decision is close."""

from dataclasses import dataclass

from tests.dist.pool import RankPool
from tests.parity.case import Case
from tests.parity.setting import FIRST_SEED, closest_allowed
from tests.parity.trace import Trace
from tests.parity.train import train, train_and_find_closest

SEEDS = 50


@dataclass(frozen=True)
class Reference:
    """closest: the smallest distance, in units of the score, between an expert taken and one that was not."""

    seed: int
    closest: float
    trace: Trace


def find_reference(pool: RankPool, case: Case) -> Reference:
    """Train the case's reference with the first seed, from FIRST_SEED on, that keeps the distance.

    RuntimeError if 50 of them do not.
    """
    first = FIRST_SEED[case.optimizer, case.routing]
    for seed in range(first, first + SEEDS):
        trained = train(pool, case.reference, seed, worker=train_and_find_closest)
        if trained.returned >= closest_allowed(case.routing):
            return Reference(seed, trained.returned, trained.trace)
    raise RuntimeError(
        f"with each of the seeds {first} to {first + SEEDS - 1}, {case.reference} comes within "
        f"{closest_allowed(case.routing)} of another choice of experts; train on fewer tokens in "
        "tests/parity/setting.py"
    )


class References:
    """The reference of each optimizer and routing, trained when it is first asked for."""

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool
        self.known: dict[Case, Reference] = {}

    def __getitem__(self, case: Case) -> Reference:
        """The reference that `case` is held against."""
        if case.reference not in self.known:
            self.known[case.reference] = find_reference(self.pool, case)
        return self.known[case.reference]
