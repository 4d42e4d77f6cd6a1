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
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dist_moe.config import load_config, resolve
from dist_moe.moe.experts import GroupedExperts
from dist_moe.moe.router import Router
from dist_moe.moe.select import ExpertThreshold, ThresholdRouting, TopK, bias_inputs, biased_scores
from dist_moe.train.loop import run
from dist_moe.worker.rank_info import rank_info_from_env
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
        run(resolved, rank_info_from_env(os.environ))


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

    def record_call(module: nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal closest
        if isinstance(module, Router) and module.training:
            logits_TE, _, ids_TK = outputs
            # A token without experts is padding, or was not far above any threshold.
            chosen_T = (ids_TK[:, 0] >= 0) | module.may_take_none
            closest = min(closest, closest_choice(module, logits_TE.detach()[chosen_T]))

    with register_module_forward_hook(record_call):
        train_worker(rank, world_size, changes)
    return closest


def closest_choice(router: Router, logits_TE: Tensor) -> float:
    """How little a score, or a sum of probabilities, would have to change for a token to take other experts."""
    rule, inputs = router.rule, bias_inputs(router.rule, router.selection_bias)
    if isinstance(rule, TopK):
        best_TK = biased_scores(logits_TE, rule, inputs).topk(rule.top_k + 1).values
        return float((best_TK[:, -2] - best_TK[:, -1]).min())
    if isinstance(rule, ExpertThreshold):
        biased_TE = logits_TE + router.selection_bias
        if router.selection_bias.any():
            return float(biased_TE.abs().min())
        best_TK = biased_TE.topk(rule.top_k + 1).values
        return float((best_TK[:, -2] - best_TK[:, -1]).min())
    assert isinstance(rule, ThresholdRouting) and inputs.logit_bias_E is not None and router.threshold is not None
    sorted_TE = (logits_TE + inputs.logit_bias_E).softmax(dim=1).sort(dim=1, descending=True).values
    before_TE = sorted_TE.cumsum(dim=1)[:, : rule.max_experts - 1]
    taken_T1 = 1 + (before_TE < router.threshold).sum(dim=1, keepdim=True)
    last_T1, next_T1 = (sorted_TE.gather(1, taken_T1 - shift) for shift in (1, 0))
    return float(torch.minimum((before_TE - router.threshold).abs().min(), (last_T1 - next_T1).min()))


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
