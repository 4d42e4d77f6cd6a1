"""The training loop: what happens in each step, in order, and the evaluation at the end."""

import time
from dataclasses import replace

from dist_moe.comm.mesh import Mesh
from dist_moe.config import Resolved
from dist_moe.data.mmap_files import detect_change, reject_change
from dist_moe.data.stream import Rows
from dist_moe.errors import DataError
from dist_moe.health.checks import HealthChecks
from dist_moe.health.stop_signals import stop_requests
from dist_moe.train.checkpointing import CheckpointSchedule
from dist_moe.train.evaluate import evaluate, validation_set
from dist_moe.train.rank_flags import JobFlags, RankFlags, exchange_flags
from dist_moe.train.schedule import learning_rate_schedule
from dist_moe.train.setup import Run, build_run
from dist_moe.train.step import StepRecord, train_step
from dist_moe.worker.exit import Stopped
from dist_moe.worker.rank_info import RankInfo


def run(resolved: Resolved, rank_info: RankInfo) -> None:
    """Train as one worker: everything that `dist-moe train` does after the configuration was checked."""
    with build_run(resolved, rank_info) as built:
        train(built)


def train(run: Run) -> None:
    """Run the remaining steps of a run, save its checkpoints, and evaluate it at the end. A collective call.

    Raises:
        Stopped: A worker was asked to stop; a checkpoint of all steps so far has been saved.
        NonFiniteError: `train.skip_limit` steps in a row were skipped.
        ReplicaError: Ranks hold different replicas of one state.
        DataError: A data file was modified; a checkpoint of all steps so far has been saved.
        CheckpointError: The last checkpoint cannot be saved.
    """
    steps = run.config.train.steps
    checkpoints = CheckpointSchedule(run.state, run.report, run.checkpoint)
    health = HealthChecks(run.state, run.hang_detector, run.steps_done, on_error=checkpoints.finalize)
    with stop_requests() as requested:
        for step in range(run.steps_done + 1, steps + 1):
            health.before_step(step)
            try:
                record, flags = run_step(run, step, rank_flags(bool(requested), checkpoints))
            except DataError:
                checkpoints.save_before_error(step - 1)
                raise
            if flags.shard_written:
                checkpoints.finalize()
            health.after_step(step, record.taken, record.scales, micro_batches(run.resolved, run.mesh, step))
            checkpoints.after_step(step, record.taken, flags.stop_requested, flags.save_due)
            if flags.stop_requested and step < steps:
                run.report.stopped(step, checkpoints.newest)
                checkpoints.close()
                raise Stopped
    reject_change(detect_change(run.state.data.files))
    data = validation_set(run.config, run.state.data)
    shares = run.config.balance.target_shares(run.resolved.experts)
    metrics = evaluate(run.state.task, data, run.mesh, run.state.engine.device, max(run.steps_done, steps), shares)
    run.report.evaluation(metrics, checkpoints.newest)
    checkpoints.close()


def rank_flags(stop_requested: bool, checkpoints: CheckpointSchedule) -> RankFlags:
    """Return this rank's flags before a step."""
    return RankFlags(stop_requested, checkpoints.shard_written, save_due=checkpoints.due_by_time)


def run_step(run: Run, step: int, flags: RankFlags) -> tuple[StepRecord, JobFlags]:
    """Run one step and log it. A collective call.

    Args:
        run: The run.
        step: The number of the step, from 1.
        flags: This rank's flags before the step.

    Returns:
        The record of the step, and the flags of all ranks.

    Raises:
        DataError: A data file was modified on any rank; raised on every rank, before anything has changed.
    """
    engine, balancer, files = run.state.engine, run.state.balancer, run.state.data.files
    started_s = time.perf_counter()
    learning_rate = learning_rate_schedule(run.config).learning_rate(balancer.steps_taken)
    balance_rate = balancer.rate
    # Checked before reading, because reading a mapped file that was truncated ends the process by SIGBUS, and after
    # it, because the file may have changed in between.
    changed = detect_change(files)
    rows = [] if changed else micro_batches(run.resolved, run.mesh, step)
    batches = [run.state.stream.batch(part.first, part.count) for part in rows]
    flags = replace(flags, data_changed=changed or detect_change(files))
    counts, all_flags = exchange_flags(batches, flags, engine)
    observe = run.observer.begin(step, batches, [part.numbers for part in rows])
    record = train_step(engine, balancer, batches, learning_rate, counts, observe)
    distributions = run.observer.finish(step, record.taken)
    run.report.step(step, record, balancer.biases, learning_rate, balance_rate, started_s, distributions)
    return record, all_flags


def micro_batches(resolved: Resolved, mesh: Mesh, step: int) -> list[Rows]:
    """Return this worker's part of the global batch of `step` (from 1), in micro-batches.

    The global batch is the same rows of the stream for any number of workers; each worker takes a block of it.
    """
    train = resolved.config.train
    share, micro = train.global_batch_size // mesh.world_size, train.sequences_per_forward
    first = (step - 1) * train.global_batch_size + mesh.rank * share
    return [Rows(first + offset, micro) for offset in range(0, share, micro)]
