"""Single steps of a started run, in the workers of the pool."""

from dist_moe.config import Resolved
from dist_moe.engine.train_state import TrainState
from dist_moe.train.loop import micro_batches
from dist_moe.train.rank_flags import NO_FLAGS, RankFlags, exchange_flags
from dist_moe.train.step import train_step


def one_step(
    resolved: Resolved, training: TrainState, step: int, flags: RankFlags = NO_FLAGS, rate: float = 0.01
) -> bool:
    """Run a step as the loop does; return whether all ranks have written their files of a pending checkpoint."""
    engine = training.engine
    rows = [] if flags.data_changed else micro_batches(resolved, engine.mesh, step)
    batches = [training.stream.batch(part.first, part.count) for part in rows]
    counts, all_flags = exchange_flags(batches, flags, engine)
    train_step(engine, training.balancer, batches, rate, counts)
    return all_flags.shard_written
