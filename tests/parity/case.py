"""The cases: every valid layout, optimizer and way to start the workers, and small sets that cover them."""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

WORKERS = (1, 2, 4)
EXPERT_PARALLEL = (1, 2, 4)
ZERO_STAGES = (0, 1, 2)
MICRO_BATCHES = (1, 3)  # in one step, on each worker: without and with accumulation
OPTIMIZERS = ("sgd", "adamw")
POOL = "pool"
LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
OVER_MPI = "mpirun"
"""Its workers exchange by MPI, which adds in another order than the pool's gloo."""
LOSS_FREE = "loss_free"
OTHERS = (
    *("threshold", "adaptive_weight", "quantile", "auxiliary", "momentum", "ema_quantile", "expert_threshold"),
    *("upcycled", "classification"),
)
"""The keys of setting.ROUTING."""

Values = frozenset[tuple[int, object]]  # (place of the field, its value)


@dataclass(frozen=True)
class Case:
    """One run: what starts its workers (the pool of the tests, or a launcher), its layout, its optimizer, and how it
    routes and balances.
    """

    start: str
    workers: int
    expert_parallel: int
    zero_stage: int
    micro_batches: int
    optimizer: str
    routing: str = LOSS_FREE

    def __str__(self) -> str:
        layout = f"w{self.workers}-ep{self.expert_parallel}-z{self.zero_stage}-m{self.micro_batches}"
        routing = "" if self.routing == LOSS_FREE else f"-{self.routing}"
        return f"{self.start}-{layout}-{self.optimizer}{routing}"

    @property
    def reference(self) -> "Case":
        """One worker, nothing sharded, the whole global batch at once: what the others are held against."""
        return Case(POOL, 1, 1, 0, 1, self.optimizer, self.routing)


def every_case(*starts: str) -> list[Case]:
    """The full cross, less what cannot be: the expert-parallel degree divides the workers."""
    cross = itertools.product(starts, WORKERS, EXPERT_PARALLEL, ZERO_STAGES, MICRO_BATCHES, OPTIMIZERS)
    return [Case(*values) for values in cross if values[1] % values[2] == 0]


def other_routings(layouts: Sequence[Case]) -> list[Case]:
    """The layouts with each of the other routings."""
    return [replace(case, routing=routing) for routing in OTHERS for case in layouts]


def combinations(case: Case, size: int) -> set[Values]:
    """The case's values, `size` fields at a time."""
    return {frozenset(chosen) for chosen in itertools.combinations(enumerate(astuple(case)), size)}


def covering(cases: Sequence[Case], size: int) -> list[Case]:
    """Few of the cases, in which every combination of `size` values occurs that occurs in all of them.

    Greedy and without chance: each time the first of the cases that bring the most.
    """
    missing = set[Values]().union(*(combinations(case, size) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(combinations(case, size) & missing))
        missing -= combinations(best, size)
        chosen.append(best)
    return chosen
