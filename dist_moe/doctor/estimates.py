"""Estimates of the memory and disk space that a run needs, and checks against what is free.

Dense parameters are replicated on every rank; the experts are divided among the ranks of an expert-parallel group.
"""

import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from dist_moe.comm.mesh import Mesh
from dist_moe.comm.objects import all_gather_objects
from dist_moe.comm.shared_memory import GROWTH
from dist_moe.config import Config, Resolved
from dist_moe.doctor.context import DoctorContext, experts_per_token
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.engine.optimizer_shards import moment_names
from dist_moe.model.build import empty_model, freeze_layers, routing_rule
from dist_moe.model.convert import find_layers
from dist_moe.model.cross_entropy import choose_cross_entropy, chunk_rows, output_head
from dist_moe.text import counted, format_bytes

FP32_BYTES = 4
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ModelShape:
    """Parameter counts of the whole model, over all ranks, and the sizes that activations depend on.

    Attributes:
        dense: Parameters outside of the routed experts.
        experts: Parameters of the routed experts.
        layers: Decoder layers.
        hidden_size: Width of the model.
        experts_per_token: Experts that a token takes.
        expert_size: Width of an expert's hidden layer.
        vocabulary: Tokens of the vocabulary.
        linear_head: Whether the logits are a linear function of the last hidden states.
        frozen_dense, frozen_experts: Those of `dense` and `experts` that are not trained (`train.frozen_layers`).
        frozen_layers: Those of `layers` that have no backward pass.
    """

    dense: int
    experts: int
    layers: int
    hidden_size: int
    experts_per_token: int
    expert_size: int
    vocabulary: int
    linear_head: bool = True
    frozen_dense: int = 0
    frozen_experts: int = 0
    frozen_layers: int = 0

    @property
    def trained_dense(self) -> int:
        """Those of `dense` that are trained."""
        return self.dense - self.frozen_dense

    @property
    def trained_experts(self) -> int:
        """Those of `experts` that are trained."""
        return self.experts - self.frozen_experts


def model_shape(resolved: Resolved, vocabulary: int) -> ModelShape:
    """Count the parameters of the model on the meta device, which takes no memory."""
    config = resolved.config
    settings = AutoConfig.for_model(config.model.architecture, **{**resolved.model_config, "vocab_size": vocabulary})
    model = empty_model(settings, routing_rule(config.router, config.balance, config.model.architecture), Mesh(1, 0, 1))
    freeze_layers(model, config.train.frozen_layers)
    of_experts = [p for layer in find_layers(model) for p in layer.experts.local.parameters()]
    experts, frozen_experts = _total(of_experts), _total(p for p in of_experts if not p.requires_grad)
    total, frozen = _total(model.parameters()), _total(p for p in model.parameters() if not p.requires_grad)
    return ModelShape(
        dense=total - experts,
        experts=experts,
        layers=settings.num_hidden_layers,
        hidden_size=settings.hidden_size,
        experts_per_token=experts_per_token(config),
        expert_size=getattr(settings, "moe_intermediate_size", settings.intermediate_size),
        vocabulary=vocabulary,
        linear_head=output_head(model) is not None,
        frozen_dense=frozen - frozen_experts,
        frozen_experts=frozen_experts,
        frozen_layers=config.train.frozen_layers,
    )


def _total(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs.

    Attributes:
        fixed: Weights, gradients, fp32 master weights and optimizer moments; exact.
        activations: Of one micro-batch, with the buffers of the exchange, by a formula.
        checkpoint_copy: The host copy of an asynchronous checkpoint; exact except for random states and biases.
    """

    fixed: int
    activations: int
    checkpoint_copy: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.fixed + self.activations + self.checkpoint_copy


def estimate_memory(config: Config, shape: ModelShape, mesh: Mesh, bf16: bool, device: torch.device) -> MemoryEstimate:
    """Estimate the memory of the mesh's own rank, which computes on `device`.

    Weights and gradients are counted whole at every ZeRO stage, since ZeRO 2 frees gradients only during the backward.
    Master weights (fp32 copies, which ZeRO 1 and 2 also keep in fp32 training) and moments are divided among the ranks
    that hold the same parameters at ZeRO 1 and 2. Parameters that are not trained have a weight alone.
    """
    stage, item = config.parallel.zero_stage, 2 if bf16 else FP32_BYTES
    experts, moments = shape.experts // mesh.expert_parallel, moment_count(config)
    share = (shape.trained_dense + shape.trained_experts) // mesh.world_size
    owned = shape.trained_dense + shape.trained_experts // mesh.expert_parallel if stage == 0 else share
    fixed = (shape.dense + experts) * item + owned * (int(bf16 or stage > 0) + moments) * FP32_BYTES
    fixed += _gradient_bytes(config, shape, mesh, item)
    # The first rank that holds a weight writes it; master weights and moments are written by all ranks in equal parts.
    written = share * (int(bf16) + moments) * FP32_BYTES
    written += item * (experts * (mesh.edp_rank == 0) + shape.dense * (mesh.rank == 0))
    copied = written if config.checkpoint.asynchronous and config.checkpoint.interval else 0
    activations = _activation_bytes(config, shape, item, device)
    if config.parallel.shared_memory and mesh.expert_parallel > 1 and device.type == "cpu":
        activations += _shared_buffer_bytes(config, shape, item)
    return MemoryEstimate(fixed, activations, copied)


def _gradient_bytes(config: Config, shape: ModelShape, mesh: Mesh, item: int) -> int:
    """Return the size of the gradients; at ZeRO 1 those of a group of one rank are in fp32 (`FlatGradients`)."""
    parts = (
        (shape.trained_dense, mesh.world_size),
        (shape.trained_experts // mesh.expert_parallel, mesh.world_size // mesh.expert_parallel),
    )
    wide = config.parallel.zero_stage == 1
    return sum(numel * (FP32_BYTES if wide and ranks == 1 else item) for numel, ranks in parts)


def moment_count(config: Config) -> int:
    """Return how many moments the optimizer keeps per parameter."""
    return len(moment_names(config.train.optimizer, config.train.momentum))


def _activation_bytes(config: Config, shape: ModelShape, item: int, device: torch.device) -> int:
    """Estimate the activations of one micro-batch.

    Per token, a layer keeps about 16 widths of the model, and for each expert that the token takes 2 widths of the
    model and 4 of the expert. With activation checkpointing each layer keeps its input, and one layer at a time keeps
    everything. A layer that is not trained keeps nothing for a backward pass.
    """
    tokens = config.train.sequences_per_forward * config.data.sequence_length
    layer = 16 * shape.hidden_size + shape.experts_per_token * (2 * shape.hidden_size + 4 * shape.expert_size)
    trained = shape.layers - shape.frozen_layers
    recomputed = trained * shape.hidden_size + layer
    kept = recomputed if config.train.activation_checkpointing else trained * layer
    return tokens * kept * item + _loss_bytes(config, shape, tokens, item, device)


def _shared_buffer_bytes(config: Config, shape: ModelShape, item: int) -> int:
    """Estimate the two buffers for rows in shared memory, which keep the size of the largest exchange.

    In a step whose load is skewed, all rows of a rank may go to others.
    """
    tokens = config.train.sequences_per_forward * config.data.sequence_length
    return int(2 * GROWTH * tokens * shape.experts_per_token * shape.hidden_size * item)


def _loss_bytes(config: Config, shape: ModelShape, tokens: int, item: int, device: torch.device) -> int:
    """Estimate what the loss holds: logits three times, once in fp32, of all tokens or of a chunk.

    A loss in chunks also holds the gradients of the hidden states and, in fp32, that of the head until the backward.
    """
    if config.task.kind != "language_model":
        return tokens * shape.hidden_size * FP32_BYTES  # the pooled hidden states in fp32; the logits are few
    of_a_token = shape.vocabulary * (2 * item + FP32_BYTES)
    if not shape.linear_head or choose_cross_entropy(config.model.cross_entropy, device) is None:
        return tokens * of_a_token
    rows = chunk_rows(tokens, shape.vocabulary, FP32_BYTES, device.type)
    return rows * of_a_token + shape.hidden_size * (tokens * item + shape.vocabulary * FP32_BYTES)


def checkpoint_bytes(config: Config, shape: ModelShape, bf16: bool) -> int:
    """Return the size of one checkpoint: weights, moments, and in bf16 training the fp32 master weights."""
    weights = (shape.dense + shape.experts) * (2 if bf16 else FP32_BYTES)
    trained = shape.trained_dense + shape.trained_experts
    return weights + trained * (int(bf16) + moment_count(config)) * FP32_BYTES


def max_checkpoints(config: Config) -> int:
    """Return the largest number of checkpoints on disk at one time, including the one that is being written."""
    settings, steps = config.checkpoint, config.train.steps
    written = (steps // settings.interval if settings.interval else 0) + 1
    if not settings.keep_last:
        return written
    return min(written, settings.keep_last + 1 + (steps // settings.keep_every if settings.keep_every else 0))


@dataclass(frozen=True)
class MemoryNeed:
    """What one rank needs of one memory.

    Attributes:
        owner: The host, or the host and its device.
        needed: Bytes that the rank needs.
        free: Bytes that are free there now.
    """

    owner: str
    needed: int
    free: int


def check_memory(context: DoctorContext, shape: ModelShape, bf16: bool) -> Finding:
    """Compare what all ranks of each host and device need with what is free there."""
    device = context.dist_context.device
    estimate = estimate_memory(context.config, shape, context.mesh, bf16, device)
    host = MemoryNeed(socket.gethostname(), estimate.total, free_memory())
    own = [host]
    if device.type == "cuda":
        device_need = estimate.total - estimate.checkpoint_copy
        on_device = MemoryNeed(f"{host.owner} {device}", device_need, torch.cuda.mem_get_info(device)[0])
        own = [replace(host, needed=estimate.checkpoint_copy), on_device]
    return compare_memory(estimate, [need for needs in all_gather_objects(own, list[MemoryNeed]) for need in needs])


def compare_memory(estimate: MemoryEstimate, needs: Sequence[MemoryNeed]) -> Finding:
    """Compare needed and free memory.

    Args:
        estimate: Of rank 0, which has the largest part of the checkpoint copy.
        needs: Of all ranks.
    """
    text = (
        f"{format_bytes(estimate.total)} for rank 0: {format_bytes(estimate.fixed)} weights, gradients and optimizer "
        f"states, about {format_bytes(estimate.activations)} activations, {format_bytes(estimate.checkpoint_copy)} "
        "checkpoint copy"
    )
    by_owner: dict[str, list[MemoryNeed]] = {}
    for need in needs:
        by_owner.setdefault(need.owner, []).append(need)
    short = []
    for owner, of_owner in by_owner.items():
        needed, free = sum(need.needed for need in of_owner), min(need.free for need in of_owner)
        if needed > free:
            ranks = counted(len(of_owner), "rank")
            short.append(f"{owner} has {format_bytes(free)} free, and its {ranks} need {format_bytes(needed)}")
    if short:
        remedy = (
            "use more hosts, ZeRO 1 or 2, a smaller train.micro_batch_size, train.activation_checkpointing=true, or "
            "checkpoint.asynchronous=false"
        )
        return Finding("memory", Outcome.failed, f"{text}; {'; '.join(short)}", remedy)
    return Finding("memory", Outcome.passed, f"{text}; {format_bytes(min(need.free for need in needs))} free")


def free_memory() -> int:
    """Return the bytes of memory that this host, or the container of this process, can still provide."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    match = re.search(r"\d+", next(line for line in lines if line.startswith("MemAvailable")))
    available = int(match[0]) * 1024 if match else 0
    return min([available, *_cgroup_headroom()])


def _cgroup_headroom() -> Iterator[int]:
    """Yield the bytes left in each control group (cgroup v2) that contains this process.

    Inactive pages of files count as free, since the kernel reclaims them.
    """
    membership = Path("/proc/self/cgroup")
    lines = membership.read_text().splitlines() if membership.is_file() else []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in (CGROUP / path, *(CGROUP / path).parents):
        limit, used, stat = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
        if limit.is_file() and used.is_file() and (limit_bytes := limit.read_text().strip()).isdecimal():
            pages = re.search(r"^inactive_file (\d+)", stat.read_text(), re.MULTILINE) if stat.is_file() else None
            yield int(limit_bytes) - int(used.read_text()) + (int(pages[1]) if pages else 0)


def check_disk(context: DoctorContext, shape: ModelShape, bf16: bool) -> Finding:
    """Compare the size of the run's checkpoints with the free space of the file system of run.dir."""
    size, count = checkpoint_bytes(context.config, shape, bf16), max_checkpoints(context.config)
    return compare_disk(size, count, shutil.disk_usage(context.folder).free)


def compare_disk(size: int, count: int, free: int) -> Finding:
    """Compare needed and free disk space.

    Args:
        size: Bytes of one checkpoint.
        count: Checkpoints on disk at one time, at most.
        free: Free bytes.
    """
    text = f"{counted(count, 'checkpoint')} of {format_bytes(size)}"
    text += f", {format_bytes(size * count)} in total" if count > 1 else ""
    text += f"; {format_bytes(free)} free"
    if size * count > free:
        return Finding("disk", Outcome.failed, text, "set checkpoint.keep_last, or another run.dir")
    return Finding("disk", Outcome.passed, text)
