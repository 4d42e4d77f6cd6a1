"""How much memory and disk the run will take, from the shapes of its model, against what is there.

P parameters; a rank holds the dense ones and its share of the experts.
"""

import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_gather_objects
from dist_moe.config import Config, Resolved
from dist_moe.doctor.context import DoctorContext, experts_taken
from dist_moe.doctor.finding import Finding, Outcome, bytes_in_words
from dist_moe.engine.optimizer_shards import moment_names
from dist_moe.model.build import empty_model, routing_rule
from dist_moe.model.convert import find_layers

FP32 = 4
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Shape:
    """The model in numbers: dense and expert parameters of all ranks together, and what activations depend on."""

    dense: int
    experts: int
    layers: int
    width: int
    taken: int
    expert_width: int
    vocabulary: int


def shape_of(resolved: Resolved, vocabulary: int) -> Shape:
    """From the model on the meta device, which takes no memory."""
    config = resolved.config
    settings = AutoConfig.for_model(config.model.architecture, **{**resolved.model_config, "vocab_size": vocabulary})
    model = empty_model(settings, routing_rule(config.router, config.balance), Mesh(1, 0, 1))
    experts = sum(p.numel() for layer in find_layers(model) for p in layer.experts.local.parameters())
    every = sum(p.numel() for p in model.parameters())
    sizes = (settings.num_hidden_layers, settings.hidden_size, experts_taken(config), settings.moe_intermediate_size)
    return Shape(every - experts, experts, *sizes, vocabulary)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. fixed: weights, gradients, masters and moments, exact. activations: by formula, a micro-batch.

    copy: of an asynchronous checkpoint, exact but for random states and biases; it lies in the host's memory.
    """

    fixed: int
    activations: int
    copy: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.activations + self.copy


def estimate_memory(config: Config, shape: Shape, mesh: Mesh, bf16: bool) -> Memory:
    """What the mesh's own rank takes with ZeRO `parallel.zero_stage`.

    Weights and gradients are whole on each rank: ZeRO 2 frees gradients only as it goes. Masters (fp32 copies, at
    ZeRO 1 and 2 also in fp32 training) and moments are divided over the ranks that hold the same at ZeRO 1 and 2.
    """
    stage, item = config.parallel.zero_stage, 2 if bf16 else FP32
    experts, moments = shape.experts // mesh.expert_parallel, moment_count(config)
    parameters, share = shape.dense + experts, (shape.dense + shape.experts) // mesh.world_size
    owned = parameters if stage == 0 else share
    fixed = parameters * 2 * item + owned * (int(bf16 or stage > 0) + moments) * FP32
    # The weights are written by the first rank that holds them, everything else by all in equal parts.
    written = share * (int(bf16) + moments) * FP32
    written += item * (experts * (mesh.edp_rank == 0) + shape.dense * (mesh.rank == 0))
    copied = written if config.checkpoint.asynchronous and config.checkpoint.interval else 0
    return Memory(fixed, _activations(config, shape, item), copied)


def moment_count(config: Config) -> int:
    """How many numbers the optimizer keeps of every element."""
    return len(moment_names(config.train.optimizer, config.train.momentum))


def _activations(config: Config, shape: Shape, item: int) -> int:
    """About 16 widths of a layer, and of each expert that a token takes 2 widths of the model and 4 of the expert.

    With activation checkpointing a layer keeps its input, and one layer at a time all of it. Logits are held three
    times, once in fp32.
    """
    tokens = config.train.micro_batch_size * config.data.sequence_length
    layer = 16 * shape.width + shape.taken * (2 * shape.width + 4 * shape.expert_width)
    kept = shape.layers * shape.width + layer if config.train.activation_checkpointing else shape.layers * layer
    return tokens * (kept * item + shape.vocabulary * (2 * item + FP32))


def checkpoint_bytes(config: Config, shape: Shape, bf16: bool) -> int:
    """Of one checkpoint: weights, masters where they are not the weights, moments."""
    return (shape.dense + shape.experts) * ((2 + FP32 if bf16 else FP32) + moment_count(config) * FP32)


def kept_checkpoints(config: Config) -> int:
    """How many lie on the disk at most, one in the making among them."""
    settings, steps = config.checkpoint, config.train.steps
    made = (steps // settings.interval if settings.interval else 0) + 1
    if not settings.keep_last:
        return made
    return min(made, settings.keep_last + 1 + (steps // settings.keep_every if settings.keep_every else 0))


@dataclass(frozen=True)
class Claim:
    """What one rank takes of one memory. place: whose it is. needed, free: bytes."""

    rank_info: str
    needed: int
    free: int


def check_memory(subject: DoctorContext, shape: Shape, bf16: bool) -> Finding:
    """What all ranks of each host, or each device, take against what its memory has."""
    needed, device = estimate_memory(subject.config, shape, subject.mesh, bf16), subject.dist_context.device
    host = Claim(socket.gethostname(), needed.total, free_memory())
    own = [host]
    if device.type == "cuda":
        of_device = Claim(f"{host.rank_info} {device}", needed.total - needed.copy, torch.cuda.mem_get_info(device)[0])
        own = [replace(host, needed=needed.copy), of_device]
    return compare_memory(needed, [claim for claims in all_gather_objects(own) for claim in claims])


def compare_memory(needed: Memory, found: Sequence[Claim]) -> Finding:
    """needed: of rank 0, which has the largest part of a copy. found: of all ranks."""
    told = (
        f"{bytes_in_words(needed.total)} for rank 0: {bytes_in_words(needed.fixed)} weights, gradients and optimizer, "
        f"about {bytes_in_words(needed.activations)} activations, {bytes_in_words(needed.copy)} copy for saving"
    )
    rank_infos: dict[str, list[Claim]] = {}
    for claim in found:
        rank_infos.setdefault(claim.rank_info, []).append(claim)
    short = []
    for rank_info, claims in rank_infos.items():
        wanted, free = sum(claim.needed for claim in claims), min(claim.free for claim in claims)
        if wanted > free:
            told_of = f"{bytes_in_words(free)} free, and {len(claims)} ranks need {bytes_in_words(wanted)}"
            short.append(f"{rank_info} has {told_of}")
    if short:
        remedy = (
            "use more hosts, ZeRO 1 or 2, a smaller train.micro_batch_size, train.activation_checkpointing=true, or "
            "checkpoint.asynchronous=false"
        )
        return Finding("memory", Outcome.failed, f"{told}; {'; '.join(short)}", remedy)
    least = bytes_in_words(min(claim.free for claim in found))
    return Finding("memory", Outcome.passed, f"{told}; {least} are free")


def free_memory() -> int:
    """Bytes that this host, or the container that this process is in, has to give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = re.search(r"\d+", next(line for line in lines if line.startswith("MemAvailable")))
    available = int(found[0]) * 1024 if found else 0
    return min([available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Bytes that each control group around this process leaves (cgroup v2); pages of files can be taken back."""
    told = Path("/proc/self/cgroup")
    lines = told.read_text().splitlines() if told.is_file() else []
    below = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in (CGROUP / below, *(CGROUP / below).parents):
        limit, used, parts = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
            pages = re.search(r"^inactive_file (\d+)", parts.read_text(), re.MULTILINE) if parts.is_file() else None
            yield int(most) - int(used.read_text()) + (int(pages[1]) if pages else 0)


def check_disk(subject: DoctorContext, shape: Shape, bf16: bool) -> Finding:
    """What the checkpoints of the run take, against what run.dir's file system has."""
    one, count = checkpoint_bytes(subject.config, shape, bf16), kept_checkpoints(subject.config)
    return compare_disk(one, count, shutil.disk_usage(subject.folder).free)


def compare_disk(one: int, count: int, free: int) -> Finding:
    """one: bytes of a checkpoint. count: how many are there at most."""
    told = (
        f"{count} checkpoint{'s' * (count != 1)} of {bytes_in_words(one)}, in all {bytes_in_words(one * count)}; "
        f"{bytes_in_words(free)} free"
    )
    if one * count > free:
        return Finding("disk", Outcome.failed, told, "set checkpoint.keep_last, or another run.dir")
    return Finding("disk", Outcome.passed, told)
