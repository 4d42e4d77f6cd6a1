"""Single steps of a started run, in the workers of the pool."""

from dist_moe.config import Resolved
from dist_moe.data.mmap_files import reject_change
from dist_moe.engine.train_state import TrainState
from dist_moe.train.loop import micro_batches
from dist_moe.train.rank_flags import NO_FLAGS, RankFlags, job_flags
from dist_moe.train.step import reduce_counts, train_step


def one_step(
    resolved: Resolved, training: TrainState, step: int, flags: RankFlags = NO_FLAGS, rate: float = 0.01
) -> bool:
    """Run a step as the loop does; return whether all ranks have written their files of a pending checkpoint."""
    engine = training.engine
    rows = [] if flags.data_changed else micro_batches(resolved, engine.mesh, step)
    batches = [part.of(training.stream) for part in rows]
    counts = reduce_counts(batches, engine.device, flags.as_ints())
    all_flags = job_flags(counts.extra, engine.mesh.world_size)
    if all_flags.data_changed:
        reject_change(flags.data_changed)
    train_step(engine, training.balancer, batches, rate, counts)
    return all_flags.shard_written
