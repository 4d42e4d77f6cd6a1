"""Trains a case: `dist_moe.train.loop.run` in the pool's workers, or `dist-moe launch` with a real launcher."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dist_moe.comm.place import read_place
from dist_moe.config import load_config, resolve
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.router import Router
from dist_moe.train.loop import run
from tests.dist.pool import RankPool
from tests.parity.case import POOL, Case
from tests.parity.setting import CONFIG, overrides
from tests.parity.trace import Trace, read_trace

LIMIT_S = 300.0


@dataclass(frozen=True)
class Trained:
    """A run's trace and duration, and what rank 0 returned (nothing from a launcher)."""

    trace: Trace
    seconds: float
    returned: Any = None


def train(
    pool: RankPool, case: Case, seed: int, further: tuple[str, ...] = (), worker: Callable[..., Any] | None = None
) -> Trained:
    """Train the case from nothing, in a new folder that is removed afterwards.

    further: more overrides. worker: what the pool calls in each rank instead of `train_worker`.
    """
    with tempfile.TemporaryDirectory(prefix="dist-moe-parity-") as name:
        folder = Path(name)
        changes = [*overrides(case, seed, folder), *further]
        started_s = time.monotonic()
        returned = None
        if case.start == POOL:
            returned = pool.run(worker or train_worker, case.workers, changes, timeout_s=LIMIT_S)[0]
        else:
            launch(case, changes)
        return Trained(read_trace(folder), time.monotonic() - started_s, returned)


def train_worker(rank: int, world_size: int, changes: list[str]) -> None:
    """Be one worker of a run, as the command `train` is."""
    resolved = resolve(load_config(CONFIG, changes), world_size)
    with contextlib.redirect_stdout(io.StringIO()):
        run(resolved, read_place(os.environ))


def launch(case: Case, changes: list[str]) -> None:
    """Run the program itself; RuntimeError with the end of its output if it fails."""
    options = ["--launcher", case.start, "--workers", str(case.workers)]
    argv = [sys.executable, "-m", "dist_moe", "launch", str(CONFIG), *options, *changes]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{case} ended with exit code {done.returncode}:\n{done.stdout[-4000:]}")


def train_and_find_closest(rank: int, world_size: int, changes: list[str]) -> float:
    """Train, and give the smallest distance between the last expert that a token took and the next one."""
    closest = float("inf")

    def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal closest
        if isinstance(module, Router) and module.training:
            logits_TE, _, ids_TK = outputs
            routed_T = ids_TK[:, 0] >= 0
            choice_TE = torch.sigmoid(logits_TE.detach()[routed_T]) + module.selection_bias
            best_TK = choice_TE.topk(ids_TK.shape[1] + 1).values
            closest = min(closest, float((best_TK[:, -2] - best_TK[:, -1]).min()))

    with register_module_forward_hook(look):
        train_worker(rank, world_size, changes)
    return closest


def train_with_wrong_experts(rank: int, world_size: int, changes: list[str]) -> int:
    """Train with the expert gradients times the expert-parallel degree -> expert parameters that were seen.

    That is what comes out when they are averaged over the workers that hold them instead of over all workers.
    """
    factor = load_config(CONFIG, changes).parallel.expert_parallel
    assert isinstance(factor, int)
    seen: dict[int, nn.Parameter] = {}

    def spoil(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, GroupedExperts):
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen[id(parameter)] = parameter
                    parameter.register_hook(lambda gradient: gradient * factor)

    with register_module_forward_pre_hook(spoil):
        train_worker(rank, world_size, changes)
    return len(seen)
