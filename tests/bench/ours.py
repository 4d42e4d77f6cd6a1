"""The same figures of dist_moe: saved while training waits, saved beside training, and loaded."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.checkpoint.async_saver import AsyncSaver
from dist_moe.checkpoint.resume import find_checkpoint, load_model, restore
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import Resolved, load_config, resolve
from dist_moe.engine.train_state import TrainState
from dist_moe.train.rank_flags import RankFlags
from dist_moe.train.setup import build_task, engine_settings, start_training, tokenize
from tests.bench.memory import Peak, folder_bytes
from tests.bench.size import OVERRIDES
from tests.dist.resumable import ROOT, overrides_of, started
from tests.dist.steps import one_step

STEPS = 12
"""Steps that are timed without a save."""


def measure(rank: int, world_size: int, text: Path, folder: Path) -> dict[str, float]:
    """Steps, a save that is waited for, two beside training, and a load -> seconds and MiB of the slowest rank."""
    words = overrides_of(text, folder, *OVERRIDES)
    with started(rank, world_size, words) as (resolved, training):
        steps(resolved, training, 2)
        saver = AsyncSaver(training)
        with Peak() as peak:
            began_s = time.perf_counter()
            saver.save(training.balancer.taken)
            save_s = time.perf_counter() - began_s
        plain_s = timed(resolved, training, None)
        first = beside(resolved, training, saver, plain_s)
        with Peak() as memory:
            again = beside(resolved, training, saver, plain_s)
        weights = [parameter.detach().clone() for parameter in training.task.parameters()]
        parameters = sum(weight.numel() for weight in weights)
        last = saver.save(training.balancer.taken)
    load_s, load_peak_mib = load(rank, world_size, words, weights)
    return {
        "save_s": save_s,
        "save_peak_mib": peak.mib,
        "first_stall_s": first[0],
        "stall_s": again[0],
        "lost_s": again[1],
        "write_s": again[2],
        "beside_peak_mib": memory.mib,
        "step_s": plain_s,
        "load_s": load_s,
        "load_peak_mib": load_peak_mib,
        "checkpoint_mib": folder_bytes(last.folder) / 2**20,
        "parameters": parameters,
    }


def load(rank: int, world_size: int, words: list[str], weights: list[Tensor]) -> tuple[float, float]:
    """Find, check and open the newest checkpoint in a run that starts -> seconds and MiB of that alone."""
    resolved = resolve(load_config(ROOT / "configs/debug.yaml", words), world_size)
    config, prepared = resolved.config, tokenize(resolved.config)
    mesh = make_mesh(resolved.expert_parallel)
    task = build_task(resolved, prepared, mesh)
    cpu = torch.device("cpu")
    settings = engine_settings(resolved, cpu)
    dist.barrier()
    with Peak() as opening:
        began_s = time.perf_counter()
        checkpoint = find_checkpoint(config, prepared, mesh, cpu)
        assert checkpoint is not None
        load_model(checkpoint, task, mesh)
        dist.barrier()
        seconds = time.perf_counter() - began_s
    with start_training(config, task, prepared, mesh, settings) as training:
        dist.barrier()
        with Peak() as restoring:
            began_s = time.perf_counter()
            restore(checkpoint, training)
            dist.barrier()
            seconds += time.perf_counter() - began_s
        assert all(map(torch.equal, weights, task.parameters()))
    return seconds, max(opening.mib, restoring.mib)


def steps(resolved: Resolved, training: TrainState, count: int, saver: AsyncSaver | None = None) -> bool:
    """Make steps on the same text -> whether a pending checkpoint was written by all at the last of them."""
    written = False
    for _ in range(count):
        flags = RankFlags(shard_written=saver is not None and saver.written)
        written = one_step(resolved, training, 1, flags, rate=1e-4)
    return written


def timed(resolved: Resolved, training: TrainState, saver: AsyncSaver | None) -> float:
    """Seconds of a step, over STEPS of them."""
    dist.barrier()
    began_s = time.perf_counter()
    steps(resolved, training, STEPS, saver)
    return (time.perf_counter() - began_s) / STEPS


def beside(resolved: Resolved, training: TrainState, saver: AsyncSaver, step_s: float) -> tuple[float, float, float]:
    """Save while training goes on until it is complete -> seconds: stall, all that training lost, writing."""
    dist.barrier()
    began_s, made = time.perf_counter(), 0
    saver.save_async(training.balancer.taken)
    written = False
    while not written:
        written = steps(resolved, training, 1, saver)
        made += 1
    saved = saver.finalize()
    elapsed_s = time.perf_counter() - began_s
    assert saved is not None
    return saved.stall_s, elapsed_s - made * step_s, saved.write_s
