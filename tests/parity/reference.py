"""The reference of each optimizer: one worker, with a seed under which no routing decision is close."""

from dataclasses import dataclass

from tests.dist.pool import RankPool
from tests.parity.case import reference_case
from tests.parity.setting import CLOSEST, FIRST_SEED
from tests.parity.trace import Trace
from tests.parity.train import train, train_and_find_closest

SEEDS = 50


@dataclass(frozen=True)
class Reference:
    """closest: the smallest distance, in units of the score, between an expert taken and one that was not."""

    seed: int
    closest: float
    trace: Trace


def find_reference(pool: RankPool, optimizer: str) -> Reference:
    """Train with the first seed, from FIRST_SEED on, that keeps CLOSEST. RuntimeError if 50 of them do not."""
    first = FIRST_SEED[optimizer]
    for seed in range(first, first + SEEDS):
        trained = train(pool, reference_case(optimizer), seed, worker=train_and_find_closest)
        if trained.returned >= CLOSEST:
            return Reference(seed, trained.returned, trained.trace)
    raise RuntimeError(
        f"with each of the seeds {first} to {first + SEEDS - 1}, {optimizer} comes within {CLOSEST} of another "
        "choice of experts; train on fewer tokens in tests/parity/setting.py"
    )
