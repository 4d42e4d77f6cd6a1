"""Checkpoints of dist_moe: time and memory of a blocking save, of an asynchronous save, and of a load."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.checkpoint.memory import Peak, folder_bytes, measure_cost
from benchmarks.checkpoint.size import OVERRIDES
from dist_moe.checkpoint.async_saver import AsyncSaver
from dist_moe.checkpoint.resume import Checkpoint, find_checkpoint, load_model, restore
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import Resolved, load_config, resolve
from dist_moe.engine.train_state import TrainState
from dist_moe.train.rank_flags import RankFlags
from dist_moe.train.setup import build_task, engine_settings, start_training, tokenize
from tests.dist.resumable import ROOT, overrides_of, started
from tests.dist.steps import one_step

STEPS = 12
"""Timed steps without a save."""


def measure(rank: int, world_size: int, text: Path, folder: Path) -> dict[str, float]:
    """Measure steps, a blocking save, two asynchronous saves, and a load -> seconds and MiB of this rank."""
    overrides = overrides_of(text, folder, *OVERRIDES)
    with started(rank, world_size, overrides) as (resolved, training):
        run_steps(resolved, training, 2)
        saver = AsyncSaver(training)
        with Peak() as peak:
            began_s = time.perf_counter()
            saver.save(training.balancer.steps_taken)
            save_s = time.perf_counter() - began_s
        plain_s = step_seconds(resolved, training, None)
        first = start_save(resolved, training, saver, plain_s)
        with Peak() as async_peak:
            second = start_save(resolved, training, saver, plain_s)
        weights = [parameter.detach().clone() for parameter in training.task.parameters()]
        parameters = sum(weight.numel() for weight in weights)
        last = saver.save(training.balancer.steps_taken)
    load_s, load_peak_mib = load(rank, world_size, overrides, weights)
    return {
        "save_s": save_s,
        "save_peak_mib": peak.mib,
        "first_stall_s": first[0],
        "stall_s": second[0],
        "lost_s": second[1],
        "write_s": second[2],
        "async_peak_mib": async_peak.mib,
        "step_s": plain_s,
        "load_s": load_s,
        "load_peak_mib": load_peak_mib,
        "checkpoint_mib": folder_bytes(last.folder) / 2**20,
        "parameters": parameters,
    }


def load(rank: int, world_size: int, overrides: list[str], weights: list[Tensor]) -> tuple[float, float]:
    """Find, verify and load the newest checkpoint in a new run -> seconds and MiB of the loading alone."""
    resolved = resolve(load_config(ROOT / "configs/debug.yaml", overrides), world_size)
    config, tokenized = resolved.config, tokenize(resolved.config)
    mesh = make_mesh(resolved.expert_parallel, shared_memory=config.parallel.shared_memory)
    task = build_task(resolved, tokenized, mesh)
    cpu = torch.device("cpu")
    settings = engine_settings(resolved, cpu)

    def load_weights() -> Checkpoint:
        checkpoint = find_checkpoint(config, tokenized, mesh, cpu)
        assert checkpoint is not None
        load_model(checkpoint, task, mesh)
        return checkpoint

    checkpoint, weights_cost = measure_cost(load_weights)
    with start_training(config, task, tokenized, mesh, settings) as training:
        _, state_cost = measure_cost(lambda: restore(checkpoint, training))
        assert all(map(torch.equal, weights, task.parameters()))
    return weights_cost.seconds + state_cost.seconds, max(weights_cost.peak_mib, state_cost.peak_mib)


def run_steps(resolved: Resolved, training: TrainState, count: int, saver: AsyncSaver | None = None) -> bool:
    """Make steps on the same text -> whether all ranks had written a pending checkpoint at the last step."""
    written = False
    for _ in range(count):
        flags = RankFlags(shard_written=saver is not None and saver.written)
        written = one_step(resolved, training, 1, flags, rate=1e-4)
    return written


def step_seconds(resolved: Resolved, training: TrainState, saver: AsyncSaver | None) -> float:
    """Return the seconds of a step, as the mean over STEPS steps."""
    dist.barrier()
    began_s = time.perf_counter()
    run_steps(resolved, training, STEPS, saver)
    return (time.perf_counter() - began_s) / STEPS


def start_save(
    resolved: Resolved, training: TrainState, saver: AsyncSaver, step_s: float
) -> tuple[float, float, float]:
    """Save asynchronously and train until it is complete -> seconds of stall, of all lost training time, of writing."""
    dist.barrier()
    began_s, completed = time.perf_counter(), 0
    saver.start_save(training.balancer.steps_taken)
    written = False
    while not written:
        written = run_steps(resolved, training, 1, saver)
        completed += 1
    saved = saver.finalize()
    elapsed_s = time.perf_counter() - began_s
    assert saved is not None
    return saved.stall_s, elapsed_s - completed * step_s, saved.write_s
