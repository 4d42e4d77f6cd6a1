"""Checks that train: expert parallelism gives the gradients of one rank, and a checkpoint restores the same bits.

They train the user's own model with few layers (a dense one where there is one, and two MoE layers) and few experts.
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
from dist_moe.checkpoint.training_state import seed_rng
from dist_moe.comm.init import set_pg_timeouts
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.config import Config
from dist_moe.data.labeled.stream import LabeledBatch
from dist_moe.data.stream import Batch
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.engine.deepspeed import EngineSettings
from dist_moe.engine.train_state import RunBatch, TrainState
from dist_moe.families.registry import family_of
from dist_moe.model.build import build_model, routing_rule
from dist_moe.model.convert import find_layers
from dist_moe.model.head import has_head, head_settings
from dist_moe.model.tasks.base import Task
from dist_moe.model.tasks.classification import ClassificationTask
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.moe.select import ExpertThreshold, Rule, ThresholdRouting, TopK
from dist_moe.text import format_bytes
from dist_moe.train.setup import engine_settings, start_training
from dist_moe.train.step import train_step

MIN_EXPERTS, MAX_LENGTH, VOCABULARY = 8, 64, 257
CLASSES = ("a", "b", "c")
TOLERANCE = 1e-4
"""Allowed difference, relative to the largest change of a weight and to the norm: sums over ranks differ in order."""
LEARNING_RATE = 100.0
"""So large that the rounding of a weight is negligible compared with its change; the model is discarded."""


class StepChange(NamedTuple):
    """The result of one step.

    Attributes:
        norm: Gradient norm before clipping.
        dense: Change of each dense weight, by name.
        experts: Change of each weight of the local experts, by layer, expert and kind.
    """

    norm: float
    dense: dict[str, Tensor]
    experts: dict[str, Tensor]


def small_model_config(context: DoctorContext, expert_parallel: int) -> tuple[dict[str, Any], Rule]:
    """Return the keys of the model's config class and the selection rule of a small model that trains in seconds."""
    config, family = context.config, family_of(context.config.model.architecture)
    settings = {**context.resolved.model_config, "vocab_size": VOCABULARY}
    rule = routing_rule(config.router, config.balance, config.model.architecture)
    top_k = min(rule.max_experts_per_token, context.resolved.experts)
    experts = min(max(MIN_EXPERTS, top_k), context.resolved.experts)
    experts = -(-experts // expert_parallel) * expert_parallel
    settings |= {family.experts_key: experts, **family.few_layers}
    settings |= head_settings(config.task, CLASSES)
    settings |= {key: 1 for key in (family.groups_key, family.topk_groups_key) if key is not None}
    if isinstance(rule, ThresholdRouting | ExpertThreshold):
        return settings, replace(rule, max_experts=min(top_k, experts))
    if isinstance(rule, TopK):
        return settings, replace(rule, groups=1, topk_groups=1)
    return settings, rule


def small_task(context: DoctorContext, mesh: Mesh) -> Task:
    """Return the small model and its loss on a mesh, with the implementations of the run."""
    config, (model_config, rule) = context.config, small_model_config(context, context.mesh.expert_parallel)
    settings = config.model
    model = build_model(
        settings.architecture,
        model_config,
        rule,
        mesh,
        config.run.seed,
        settings.attention,
        settings.norm,
        settings.moe_kernels,
    )
    if has_head(model.config):
        return ClassificationTask(model, needs_margins=config.balance.needs_margins)
    return LanguageModelTask(model, needs_margins=config.balance.needs_margins, cross_entropy=settings.cross_entropy)


def check_parity(context: DoctorContext) -> Finding:
    """Compare one SGD step in fp32 with the run's expert parallelism to the same step without it."""
    name, mesh = "EP 1 = EP N", context.mesh
    if mesh.expert_parallel == 1:
        return Finding(name, Outcome.not_applicable, "the run has expert parallel 1")
    reference, actual = run_one_step(context, make_mesh(1)), run_one_step(context, mesh)
    max_error, worst = 0.0, ""
    local_experts = {key: value for key, value in reference.experts.items() if key in actual.experts}
    for key, expected in {**reference.dense, **local_experts}.items():
        changed = actual.dense.get(key, actual.experts.get(key))
        largest = float(expected.abs().max())
        error = math.inf if changed is None else float((changed - expected).abs().max()) / max(largest, 1e-12)
        error = error if math.isfinite(error) else math.inf
        # A weight that does not change at all has no relative error.
        if (largest > 1e-10 or error == math.inf) and error >= max_error:
            max_error, worst = error, key
    norm_error = abs(actual.norm - reference.norm) / reference.norm
    text = (
        f"gradients of {len(reference.dense)} dense and {len(local_experts)} expert tensors differ by at most "
        f"{max_error:.1e} of their largest value, the norm by {norm_error:.1e} (allowed {TOLERANCE:.0e})"
    )
    if max_error <= TOLERANCE and norm_error <= TOLERANCE:
        return Finding(name, Outcome.passed, text)
    remedy = "try parallel.all_to_all=flat, another parallel.backend or zero_stage, and report the problem"
    return Finding(name, Outcome.failed, f"rank {mesh.rank}: {text}; the largest is in {worst}", remedy)


def run_one_step(context: DoctorContext, mesh: Mesh) -> StepChange:
    """Make one SGD step of the small model on a mesh, with the same tokens for every mesh."""
    settings = replace(
        engine_settings(context.resolved, context.dist_context.device),
        optimizer="sgd",
        momentum=0.0,
        bf16=False,
        micro_batch_size=1,
        accumulation=1,
    )
    with small_run(context, mesh, settings) as train_state:
        before = weights_by_name(train_state, mesh)
        batch = sample_batch(context, mesh.rank)
        seed_rng(context.config.run.seed, 0, mesh.rank)  # dropout
        record = train_step(train_state.engine, train_state.balancer, [batch], LEARNING_RATE)
        after = weights_by_name(train_state, mesh)
    dense, experts = ({name: after[part][name] - value for name, value in before[part].items()} for part in (0, 1))
    return StepChange(record.grad_norm, dense, experts)


def weights_by_name(train_state: TrainState, mesh: Mesh) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copy the dense weights and those of the local experts, by names that do not depend on the mesh."""
    dense = {
        name: parameter.detach().clone()
        for name, parameter in train_state.task.named_parameters()
        if ".experts.local." not in name
    }
    experts = {}
    for layer in find_layers(train_state.task.model):
        local = layer.experts.local
        for index, expert in enumerate(mesh.local_experts(layer.experts.num_experts)):
            for kind, stacked in local.named_parameters():
                experts[f"{layer.name}.{expert}.{kind}"] = stacked.detach()[index].clone()
    return dense, experts


def sample_batch(context: DoctorContext, rank: int) -> RunBatch:
    """Return random tokens of one rank, equal in every run."""
    length = min(MAX_LENGTH, context.config.data.sequence_length)
    generator = torch.Generator().manual_seed(1000 + rank)
    tokens = torch.randint(0, VOCABULARY, (1, length + 1), generator=generator)
    zeros = torch.zeros(1, length, dtype=torch.int64)
    if context.config.task.kind != "language_model":
        label = torch.tensor([rank % len(CLASSES)], dtype=torch.float64)
        return LabeledBatch(tokens[:, :-1], torch.ones(1, length, dtype=torch.bool), zeros, label)
    return Batch(tokens[:, :-1], tokens[:, 1:], zeros, torch.arange(length).reshape(1, -1), zeros)


@contextmanager
def small_run(
    context: DoctorContext, mesh: Mesh, settings: EngineSettings, checkpoint: Checkpoint | None = None
) -> Iterator[TrainState]:
    """Open the small model in an engine, in the doctor's own folder.

    Args:
        context: Input of the check.
        mesh: Layout of the run.
        settings: Of the engine.
        checkpoint: To resume from; None for a fresh start.
    """
    config, task = doctor_config(context), small_task(context, mesh)
    if checkpoint is not None:
        load_model(checkpoint, task, mesh)
    assert context.tokenized is not None
    with start_training(config, task, context.tokenized, mesh, settings) as train_state:
        set_pg_timeouts(context.limit_s)
        if checkpoint is not None:
            restore(checkpoint, train_state)
        yield train_state


def doctor_config(context: DoctorContext) -> Config:
    """Return the user's configuration with the doctor's folder as run.dir, resuming from the checkpoint in it."""
    run = context.config.run.model_copy(update={"dir": str(context.folder)})
    checkpoint = context.config.checkpoint.model_copy(update={"resume": AUTO})
    changes: dict[str, Any] = {"run": run, "checkpoint": checkpoint}
    if "shares" in type(context.config.balance).model_fields:
        # The small model may have fewer experts than the shares are for.
        changes["balance"] = context.config.balance.model_copy(update={"shares": None})
    return context.config.model_copy(update=changes)


def check_saving(context: DoctorContext) -> Finding:
    """Save the small model on all ranks, resume from it in another engine, and compare the bits.

    Compared are weights, fp32 master weights, moments, biases and random states. The files take the same path as those
    of a run, between hosts too.
    """
    name, mesh = "save and load", context.mesh
    settings = replace(
        engine_settings(context.resolved, context.dist_context.device), micro_batch_size=1, accumulation=1
    )
    with small_run(context, mesh, settings) as train_state:
        train_step(train_state.engine, train_state.balancer, [sample_batch(context, mesh.rank)], 1e-3)
        saved = saved_tensors(train_state)
        began_s = time.perf_counter()
        saver = AsyncSaver(train_state)
        size = saver.save(1).bytes
        save_s = time.perf_counter() - began_s
        saver.close()
    assert context.tokenized is not None
    began_s = time.perf_counter()
    checkpoint = find_checkpoint(doctor_config(context), context.tokenized, mesh, context.dist_context.device)
    load_s = time.perf_counter() - began_s
    if checkpoint is None:
        return Finding(name, Outcome.failed, f"rank {mesh.rank} finds no checkpoint", "check the storage of run.dir")
    with small_run(context, mesh, settings, checkpoint) as train_state:
        loaded = saved_tensors(train_state)
    keys = sorted(saved | loaded)
    wrong = [key for key in keys if key not in loaded or not torch.equal(saved[key], loaded[key])]
    text = f"{format_bytes(size)} saved in {save_s:.2f} s ({size / save_s / 1e6:,.0f} MB/s), verified in {load_s:.2f} s"
    if wrong:
        text += f"; rank {mesh.rank} restores different bits in {', '.join(wrong[:3])}"
        return Finding(name, Outcome.failed, text, "check the storage of run.dir, and report the problem")
    return Finding(name, Outcome.passed, f"{text}; weights, moments and biases are restored bit for bit")


def saved_tensors(train_state: TrainState) -> dict[str, Tensor]:
    """Copy everything that this rank writes into a checkpoint, by file and name, and the weights that others write."""
    files = collect(train_state, 1).tensors.items()
    written = {f"{name} in {file}": tensor.clone() for file, part in files for name, tensor in part.items()}
    weights = {name: parameter.detach().clone() for name, parameter in train_state.task.named_parameters()}
    return written | weights
