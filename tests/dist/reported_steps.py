"""Code that ranks run in the tests of metrics: reported steps, and the loads of micro-batches."""

import contextlib
import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_moe.balancing.counts import RoutingCounts
from dist_moe.comm.init import DistContext
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import load_config
from dist_moe.train.reporting import open_report
from dist_moe.train.step import StepRecord, train_step
from dist_moe.worker.rank_info import rank_info_from_env
from tests.collectives import counted
from tests.dist.balanced import CONFIG, CPU, started
from tests.dist.small import Case, make_balancer, ragged_batch, share

MICRO_BATCHES = 3
SIZES = (8, 4)  # experts of the two layers
STARTED_S = (1.0, 5.0, 8.0)  # of the three steps
LOGGED_S = (3.0, 9.0)  # when the first and the third have been taken


@dataclass(frozen=True)
class ReportedSteps:
    """What one rank observed.

    Attributes:
        collectives: All-reduces of a logged step, of a step that is not logged, and of a skipped step.
        lines: Of metrics.jsonl, on rank 0.
        events: Lines of events.jsonl, on rank 0.
    """

    collectives: list[int]
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]


def micro_loads(rank: int) -> list[list[Tensor]]:
    """Return the loads of a rank: one expert of each layer is popular, a different one on each rank and micro-batch."""
    loads = []
    for micro_batch in range(MICRO_BATCHES):
        popular = rank + 2 * micro_batch
        loads.append(
            [torch.ones(size, dtype=torch.int64).index_fill(0, torch.tensor(popular % size), 9) for size in SIZES]
        )
    return loads


def report_steps(rank: int, world_size: int, expert_parallel: int, folder: str) -> ReportedSteps:
    """Report steps with the loads of `micro_loads`, an auxiliary loss of 1 + rank and a threshold of one half."""
    overrides = [f"run.dir={folder}", "observe.tensorboard=false", "observe.interval=10", "train.steps=20"]
    config = load_config(CONFIG, overrides)
    dist_context = DistContext(rank_info_from_env(os.environ), CPU, "gloo")
    mesh = make_mesh(expert_parallel)
    all_loads = [load for of_rank in range(world_size) for load in micro_loads(of_rank)]
    load_L = [torch.stack(layer).sum(dim=0) for layer in zip(*all_loads, strict=True)]
    routing_counts = [RoutingCounts(load_E, torch.tensor([int(load_E.sum()), 0])) for load_E in load_L]
    record = StepRecord(
        scales=(torch.ones(()), torch.ones(())),
        taken=True,
        grad_norm=1.0,
        nll_sum=torch.tensor(2.0),
        auxiliary=torch.tensor(1.0 + rank),
        label_tokens=4 * world_size,
        routing_counts=routing_counts,
        micro_loads=micro_loads(rank),
        threshold=0.5,
    )
    biases = [torch.zeros(size) for size in SIZES]
    collectives, clock = [], iter(LOGGED_S)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        open_report(config, dist_context, mesh, clock=lambda: next(clock)) as report,
    ):
        for step, taken in ((1, True), (2, True), (3, False)):
            with counted("all_reduce") as calls:
                report.step(step, replace(record, taken=taken), biases, 0.1, 0.01, STARTED_S[step - 1])
            collectives.append(len(calls))
        report.warn("one", "another")
        report.stopped(3, Path("step-000003"))
    texts = [Path(folder, name).read_text() if rank == 0 else "" for name in ("metrics.jsonl", "events.jsonl")]
    lines, events = ([json.loads(line) for line in text.splitlines()] for text in texts)
    return ReportedSteps(collectives, lines, events)


def loads_of_a_step(rank: int, world_size: int, expert_parallel: int) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Make a step of two micro-batches -> this rank's loads of each of them, and the loads of the step."""
    case = Case(expert_parallel=expert_parallel, accumulation=2)
    with started(case, world_size) as (engine, task):
        record = train_step(engine, make_balancer(task), share(ragged_batch(), engine.mesh, 2), 1.0)
        assert {load.dtype for loads in record.micro_loads for load in loads} == {torch.int64}
        own = [[load.tolist() for load in loads] for loads in record.micro_loads]
        return own, [load.tolist() for load in record.loads]
