"""The work of a rank in the tests of balancing: steps, evaluations, and a whole run."""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_moe.balancing.balancer import Balancer
from dist_moe.balancing.counts import RoutingCounts
from dist_moe.checkpoint.format.hf_weights import load_weights, save_weights
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.config import load_config, resolve
from dist_moe.data.corpus import Corpus
from dist_moe.data.stream import IGNORE_INDEX, Batch, Stream
from dist_moe.engine.deepspeed import Engine, EngineSettings, start_engine
from dist_moe.model.build import parameter_groups
from dist_moe.model.inputs import model_inputs
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.moe.router import Router
from dist_moe.moe.select import TopK
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.registry import make_policy
from dist_moe.train.evaluate import ValidationSet, evaluate
from dist_moe.train.loop import run
from dist_moe.train.step import train_step
from dist_moe.worker.rank_info import rank_info_from_env
from tests.collectives import counted
from tests.dist.small import LENGTH, ROWS, VOCABULARY, Case, make_balancer, make_task, ragged_batch, share

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"


@contextlib.contextmanager
def started(case: Case, world_size: int) -> Iterator[tuple[Engine, LanguageModelTask]]:
    """The small model under the engine, as one rank of a joined world."""
    mesh = make_mesh(case.expert_parallel)
    task = make_task(case, mesh)
    micro_batch_size = ROWS // (world_size * case.accumulation)
    settings = EngineSettings(
        case.zero_stage, micro_batch_size, case.accumulation, case.optimizer, case.clipping, case.bf16
    )
    with start_engine(task, parameter_groups(task.model, 0.1), settings, mesh) as engine:
        yield engine, task


def validation_set(rows: int, micro_batch_size: int = 2) -> ValidationSet:
    """`rows` of a corpus of 9 rows, the last of which is padded; its text is random and never changes."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, 8 * LENGTH + 6).astype(np.uint16)
    ends = np.array([50, 51, 120, len(tokens)])
    tokens[ends - 1] = 0
    starts_N1 = np.concatenate([[0], ends])
    corpus = Corpus(tokens, starts_N1, np.zeros(len(ends), dtype=np.int64), ("text",), 0, len(tokens))
    stream = Stream(corpus, LENGTH, seed=0)
    assert stream.rows_per_epoch == 9
    return ValidationSet(stream, np.arange(VOCABULARY, dtype=np.int64), rows, micro_batch_size)


def steps_with_evaluation(rank: int, world_size: int, evaluated: bool) -> tuple[list[Tensor], list[Any]]:
    """Two steps, with or without an evaluation after each -> the biases, and the load of each step."""
    with started(Case(expert_parallel=2), world_size) as (engine, task):
        balancer = make_balancer(task)
        loads = []
        for step in range(2):
            batches = share(ragged_batch(seed=step), engine.mesh, 1)
            loads.append([load.tolist() for load in train_step(engine, balancer, batches, 1.0).loads])
            if evaluated:
                evaluate(task, validation_set(rows=5), engine.mesh, CPU, step)
        return [bias.clone() for bias in balancer.biases], loads


def evaluations(rank: int, world_size: int, expert_parallel: int, rows: list[int]) -> list[dict[str, Any]]:
    """The record of an evaluation of each of these numbers of rows."""
    mesh = make_mesh(expert_parallel)
    task = make_task(Case(), mesh)
    return [evaluate(task, validation_set(count), mesh, CPU, 1).as_dict() for count in rows]


def half_of_padding(rank: int, world_size: int) -> tuple[float, float, list[list[int]], list[Tensor]]:
    """A step in which the second half of the global batch is padding -> share of the loss, norm, loads, biases."""
    with started(Case(expert_parallel=world_size), world_size) as (engine, task):
        batch = Batch(*(tensor.clone() for tensor in ragged_batch()))
        batch.documents_BS[ROWS // 2 :] = -1
        batch.targets_BS[ROWS // 2 :] = IGNORE_INDEX
        balancer = make_balancer(task)
        record = train_step(engine, balancer, share(batch, engine.mesh, 1), 1.0)
        loss = float(record.nll_sum) / record.label_tokens
        loads = [load.tolist() for load in record.loads]
        return loss, record.grad_norm, loads, [bias.clone() for bias in balancer.biases]


def biases_in_bf16(rank: int, world_size: int, folder: str) -> list[list[Tensor]]:
    """Biases of one half after one step of u = 0.001 in the engine's bf16, and after a save and a load."""
    with started(Case(expert_parallel=world_size, bf16=True), world_size) as (engine, task):
        for layer in task.layers:
            layer.router.selection_bias += 0.5
        balancer = make_balancer(task, Case(policy=LossFree(rate=1e-3)))
        train_step(engine, balancer, share(ragged_batch(), engine.mesh, 1), 0.0)
        assert {parameter.dtype for parameter in task.parameters()} == {torch.bfloat16}
        save_weights(task.model, engine.mesh, Path(folder), balanced=True)
        again = LanguageModelTask(load_weights(Path(folder), Mesh(1, 0, 1))).bfloat16()
        loaded = [layer.router.selection_bias for layer in again.layers]
        return [[bias.clone() for bias in biases] for biases in (balancer.biases, loaded)]


def layers_of_many_sizes(rank: int, world_size: int, policy: str) -> tuple[list[list[int]], list[list[float]], int]:
    """Layers of 2, 5 and 3 experts, other loads on each rank -> loads, biases, and the collectives of the step."""
    routers = {f"layer.{layer}": Router(count, 4, TopK(1, "sigmoid")) for layer, count in enumerate((2, 5, 3))}
    balancer = Balancer(routers, make_policy(policy, rate=0.5), CPU, schedule_steps=10)
    seen = [torch.arange(router.num_experts) * (rank + 1) for router in routers.values()]
    balancer.observe([RoutingCounts(load_E, load_E.sum().view(1)) for load_E in seen])
    with counted("all_reduce") as calls:
        routing_counts = balancer.step()
    return (
        [layer_counts.load_E.tolist() for layer_counts in routing_counts],
        [bias.tolist() for bias in balancer.biases],
        len(calls),
    )


def whole_run(
    rank: int, world_size: int, folder: str, overrides: Sequence[str] = ()
) -> tuple[str, list[dict[str, Any]]]:
    """One step of configs/debug.yaml on a text of its own, with `overrides` -> what it printed, and its metrics."""
    os.environ["DIST_MOE_CACHE"] = f"{folder}/cache"
    config = load_config(
        CONFIG,
        [
            f"run.dir={folder}/run",
            f"data.sources=[{folder}/*.txt]",
            "data.validation_fraction=0.5",
            "train.steps=1",
            "train.warmup_steps=0",
            "checkpoint.interval=0",
            "observe.tensorboard=false",
            *overrides,
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(resolve(config, world_size), rank_info_from_env(os.environ))
    metrics = Path(folder, "run", "metrics.jsonl")
    lines = metrics.read_text().splitlines() if rank == 0 else []
    return printed.getvalue(), [json.loads(line) for line in lines]


def gradients(checkpointing: bool, biases: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor], int]:
    """A forward and a plain backward on one process -> gradients, loads, and how often routers ran."""
    task = make_task(Case(checkpointing=checkpointing), Mesh(1, 0, 1))
    calls: list[nn.Module] = []
    for layer, bias_E in zip(task.layers, biases, strict=True):
        layer.router.selection_bias.copy_(bias_E)
        layer.router.register_forward_hook(lambda module, *_: calls.append(module))
    output = task(model_inputs(ragged_batch(), torch.device("cpu")), torch.tensor(0.01))
    output.loss.backward()
    found = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    return found, output.loads, len(calls)
