"""Single steps of a started run, in the workers of the pool."""

from dist_moe.config import Resolved
from dist_moe.engine.train_state import TrainState
from dist_moe.train.loop import micro_batches
from dist_moe.train.step import NOTHING, Word, train_step


def one_step(resolved: Resolved, training: TrainState, step: int, word: Word = NOTHING, rate: float = 0.01) -> bool:
    """A step -> whether all ranks have written their files of a pending checkpoint."""
    batches = [part.of(training.stream) for part in micro_batches(resolved, training.engine.mesh, step)]
    return train_step(training.engine, training.balancer, batches, rate, word).written
