"""Checks that train: expert parallelism gives the gradients of one rank, and what is saved comes back.

The model is the user's own with few layers: the first kind and two MoE layers, and as many experts as are needed.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_moe.checkpoint.async_saver import AsyncSaver
from dist_moe.checkpoint.resume import AUTO, Checkpoint, find_checkpoint, load_model, restore
from dist_moe.checkpoint.snapshot import collect
from dist_moe.comm.init import set_pg_timeouts
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.config import Config
from dist_moe.data.stream import Batch
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.finding import Finding, Outcome, bytes_in_words
from dist_moe.engine.deepspeed import EngineSettings
from dist_moe.engine.train_state import TrainState
from dist_moe.families.registry import family_of
from dist_moe.model.build import build_model, routing_rule
from dist_moe.model.convert import find_layers
from dist_moe.model.task import LanguageModelTask
from dist_moe.moe.select import Rule, ThresholdRouting, TopK
from dist_moe.train.setup import engine_settings, start_training
from dist_moe.train.step import train_step

FEW_EXPERTS, LONGEST, VOCABULARY = 8, 64, 257
TOLERANCE = 1e-4
"""Of the largest change of a weight, and of the norm: sums over ranks have another order."""
RATE = 100.0
"""So large that the rounding of a weight is nothing beside its change; the model is thrown away."""


class Outcomes(NamedTuple):
    """A step's: norm of the gradient before clipping, and the change of each dense and of each local expert tensor."""

    norm: float
    dense: dict[str, Tensor]
    experts: dict[str, Tensor]


def few_layers(subject: DoctorContext, expert_parallel: int) -> tuple[dict[str, Any], Rule]:
    """Keys of the model's config class for a model that takes seconds, and its rule of routing."""
    config, family = subject.config, family_of(subject.config.model.architecture)
    settings = {**subject.resolved.model_config, "vocab_size": VOCABULARY}
    rule = routing_rule(config.router, config.balance)
    taken = min(rule.max_experts_per_token, subject.resolved.experts)
    experts = min(max(FEW_EXPERTS, taken), subject.resolved.experts)
    experts = -(-experts // expert_parallel) * expert_parallel
    settings |= {family.experts_key: experts, **family.few_layers}
    settings |= {key: 1 for key in (family.groups_key, family.topk_groups_key) if key is not None}
    if isinstance(rule, ThresholdRouting):
        return settings, replace(rule, max_experts=min(taken, experts))
    if isinstance(rule, TopK):
        return settings, replace(rule, groups=1, topk_groups=1)
    return settings, rule


def check_parity(subject: DoctorContext) -> Finding:
    """One SGD step in fp32 with the run's expert parallelism changes every weight as one without any does."""
    name, mesh = "EP 1 = EP N", subject.mesh
    if mesh.expert_parallel == 1:
        return Finding(name, Outcome.idle, "the run has expert parallel 1")
    alone, shared = one_step(subject, make_mesh(1)), one_step(subject, mesh)
    far, where = 0.0, ""
    own = {key: value for key, value in alone.experts.items() if key in shared.experts}
    for key, wanted in {**alone.dense, **own}.items():
        found = shared.dense.get(key, shared.experts.get(key))
        largest = float(wanted.abs().max())
        away = float("inf") if found is None else float((found - wanted).abs().max()) / max(largest, 1e-12)
        away = away if math.isfinite(away) else math.inf
        if (largest > 1e-10 or away == math.inf) and away >= far:
            far, where = away, key
    norm = abs(shared.norm - alone.norm) / alone.norm
    told = (
        f"gradients of {len(alone.dense)} dense and {len(own)} expert tensors differ by at most {far:.1e} of their "
        f"largest, the norm by {norm:.1e} (allowed {TOLERANCE:.0e})"
    )
    if far <= TOLERANCE and norm <= TOLERANCE:
        return Finding(name, Outcome.passed, told)
    remedy = "try parallel.all_to_all=flat, another parallel.backend or zero_stage, and report it"
    return Finding(name, Outcome.failed, f"rank {mesh.rank}: {told}; most in {where}", remedy)


def one_step(subject: DoctorContext, mesh: Mesh) -> Outcomes:
    """One SGD step of the small model, the same tokens whatever the mesh."""
    settings = replace(
        engine_settings(subject.resolved, subject.dist_context.device),
        optimizer="sgd",
        momentum=0.0,
        bf16=False,
        micro_batch_size=1,
        accumulation=1,
    )
    with small_training(subject, mesh, settings) as training:
        before = named(training, mesh)
        batch = row(subject, mesh.rank)
        record = train_step(training.engine, training.balancer, [batch], RATE)
        after = named(training, mesh)
    dense, experts = ({name: after[part][name] - value for name, value in before[part].items()} for part in (0, 1))
    return Outcomes(record.grad_norm, dense, experts)


def named(training: TrainState, mesh: Mesh) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the dense weights, and of each expert that this rank holds, by names without a layout."""
    dense = {
        name: parameter.detach().clone()
        for name, parameter in training.task.named_parameters()
        if ".experts.local." not in name
    }
    experts = {}
    for layer in find_layers(training.task.model):
        local = layer.experts.local
        for index, expert in enumerate(mesh.local_experts(layer.experts.experts)):
            for kind, stacked in (("gate_up", local.gate_up_proj), ("down", local.down_proj)):
                experts[f"{layer.name}.{expert}.{kind}"] = stacked.detach()[index].clone()
    return dense, experts


def row(subject: DoctorContext, rank: int) -> Batch:
    """Tokens of one rank, the same in every run."""
    length = min(LONGEST, subject.config.data.sequence_length)
    generator = torch.Generator().manual_seed(1000 + rank)
    tokens = torch.randint(0, VOCABULARY, (1, length + 1), generator=generator)
    zeros = torch.zeros(1, length, dtype=torch.int64)
    return Batch(tokens[:, :-1], tokens[:, 1:], zeros, torch.arange(length).reshape(1, -1), zeros)


@contextmanager
def small_training(
    subject: DoctorContext, mesh: Mesh, settings: EngineSettings, found: Checkpoint | None = None
) -> Iterator[TrainState]:
    """The small model in a real engine, in the doctor's own folder; with `found` it goes on from there."""
    config, (model_config, rule) = small_config(subject), few_layers(subject, subject.mesh.expert_parallel)
    model = build_model(config.model.architecture, model_config, rule, mesh, config.run.seed)
    task = LanguageModelTask(model, needs_margins=config.balance.needs_margins)
    if found is not None:
        load_model(found, task, mesh)
    assert subject.prepared is not None
    with start_training(config, task, subject.prepared, mesh, settings) as training:
        set_pg_timeouts(subject.limit_s)
        if found is not None:
            restore(found, training)
        yield training


def small_config(subject: DoctorContext) -> Config:
    """The user's, with the doctor's folder as run.dir, and its checkpoint as that to go on from."""
    run = subject.config.run.model_copy(update={"dir": str(subject.folder)})
    checkpoint = subject.config.checkpoint.model_copy(update={"resume": AUTO})
    return subject.config.model_copy(update={"run": run, "checkpoint": checkpoint})


def check_saving(subject: DoctorContext) -> Finding:
    """The small model is saved by all ranks, and another engine goes on from there with the same bits.

    Of weights, fp32 masters, moments, biases and random states, by the way that a run takes, between hosts too.
    """
    name, mesh = "save and load", subject.mesh
    settings = replace(
        engine_settings(subject.resolved, subject.dist_context.device), micro_batch_size=1, accumulation=1
    )
    with small_training(subject, mesh, settings) as training:
        train_step(training.engine, training.balancer, [row(subject, mesh.rank)], 1e-3)
        kept = copied(training)
        began_s = time.perf_counter()
        saver = AsyncSaver(training)
        size = saver.save(1).bytes
        save_s = time.perf_counter() - began_s
        saver.close()
    assert subject.prepared is not None
    began_s = time.perf_counter()
    found = find_checkpoint(small_config(subject), subject.prepared, mesh, subject.dist_context.device)
    load_s = time.perf_counter() - began_s
    if found is None:
        return Finding(name, Outcome.failed, f"rank {mesh.rank} finds no checkpoint", "see to the storage of run.dir")
    with small_training(subject, mesh, settings, found) as training:
        again = copied(training)
    wrong = [key for key in sorted(kept | again) if key not in again or not torch.equal(kept[key], again[key])]
    told = (
        f"{bytes_in_words(size)} saved in {save_s:.2f} s ({size / save_s / 1e6:,.0f} MB/s), checked in {load_s:.2f} s"
    )
    if wrong:
        told += f"; rank {mesh.rank} goes on with other bits in {', '.join(wrong[:3])}"
        return Finding(name, Outcome.failed, told, "see to the storage of run.dir, and report it")
    return Finding(name, Outcome.passed, f"{told}; weights, moments and biases go on bit for bit")


def copied(training: TrainState) -> dict[str, Tensor]:
    """All that this rank writes of a run, by file and name, and the weights that another one writes."""
    files = collect(training, 1).tensors.items()
    written = {f"{name} in {file}": tensor.clone() for file, part in files for name, tensor in part.items()}
    weights = {name: parameter.detach().clone() for name, parameter in training.task.named_parameters()}
    return written | weights
