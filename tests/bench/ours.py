"""The same figures of dist_moe: saved while training waits, saved beside training, and loaded."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.checkpoint.async_saver import AsyncSaver
from dist_moe.checkpoint.resume import find_checkpoint, load_model, restore_run
from dist_moe.comm.init import DistContext
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import Resolved, load_config, resolve
from dist_moe.engine.deepspeed import start_engine
from dist_moe.engine.train_state import TrainState
from dist_moe.model.build import parameter_groups
from dist_moe.train.loop import engine_settings, make_balancer, make_task, micro_batches, prepare_text
from dist_moe.train.step import Word, train_step
from dist_moe.worker.rank_info import RankInfo
from tests.bench.memory import Peak, folder_bytes
from tests.bench.size import OVERRIDES
from tests.dist.resumable import ROOT, overrides_of, started

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
    config, prepared = resolved.config, prepare_text(resolved.config)
    mesh = make_mesh(resolved.expert_parallel)
    task = make_task(resolved, prepared, mesh)
    cpu = torch.device("cpu")
    settings = engine_settings(resolved, DistContext(RankInfo(rank, world_size, rank, world_size, "env"), cpu, "gloo"))
    dist.barrier()
    with Peak() as opening:
        began_s = time.perf_counter()
        checkpoint = find_checkpoint(config, prepared, mesh, cpu)
        assert checkpoint is not None
        load_model(checkpoint, task, mesh)
        dist.barrier()
        seconds = time.perf_counter() - began_s
    with start_engine(task, parameter_groups(task.model, config.train.weight_decay), settings, mesh) as engine:
        training = TrainState(config, engine, make_balancer(task, config, engine.device), task, prepared)
        dist.barrier()
        with Peak() as restoring:
            began_s = time.perf_counter()
            restore_run(checkpoint, training)
            dist.barrier()
            seconds += time.perf_counter() - began_s
        assert all(map(torch.equal, weights, task.parameters()))
    return seconds, max(opening.mib, restoring.mib)


def steps(resolved: Resolved, training: TrainState, count: int, saver: AsyncSaver | None = None) -> bool:
    """Make steps on the same text -> whether a pending checkpoint was written by all at the last of them."""
    written = False
    for _ in range(count):
        batches = [part.of(training.stream) for part in micro_batches(resolved, training.engine.mesh, 1)]
        word = Word(written=saver is not None and saver.written)
        written = train_step(training.engine, training.balancer, batches, 1e-4, word).written
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
