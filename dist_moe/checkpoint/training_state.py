"""What a run needs to go on, beside its weights: moments, balance, random states and counts, free of any layout.

state/rank-NNNNN.safetensors holds the elements that one rank's optimizer held, and its random states;
state/balance.safetensors what the balancer keeps of each layer; state/training.json the numbers.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_moe.balance.balancer import Balancer
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_folder import stored_tensors
from dist_moe.checkpoint.format.hf_weights import named_parameters
from dist_moe.checkpoint.format.manifest import first_line, read_small
from dist_moe.checkpoint.format.shard_reader import RANDOM, ShardReader
from dist_moe.checkpoint.format.tensor_header import read_header
from dist_moe.comm.mesh import Mesh
from dist_moe.config.base import Section
from dist_moe.engine.deepspeed import Engine
from dist_moe.engine.optimizer_shards import (
    MASTER,
    STEPS,
    OptimizerFragment,
    TensorFragment,
    key,
    mapping_is_wrong,
    optimizer_tensors,
    tensor_fragments,
)
from dist_moe.engine.train_state import TrainState

BALANCE = "balance.safetensors"
COUNTERS = "training.json"


class Counters(Section):
    """step: optimizer steps done; taken: those that were not skipped. controller: the budget's (`Controller`).

    corpus: the fingerprint of the text. The others say where the checkpoint comes from, and bind nobody.
    """

    step: int = Field(ge=0)
    taken: int = Field(ge=0)
    controller: tuple[float, float, float, float] | None
    corpus: str
    workers: int
    expert_parallel: int
    zero_stage: int
    bf16: bool


def state_tensors(training: TrainState) -> dict[str, dict[str, Tensor]]:
    """This rank's part of `state/`: tensors by name, by file; mostly views. Rank 0 has what all share too."""
    engine, mesh = training.engine, training.engine.mesh
    found = [piece for piece in own_fragments(training) if piece.numel]
    tensors = dict(optimizer_tensors(found, engine.optimizer_state, engine.has_masters))
    tensors |= {key(RANDOM, f"{device}/{mesh.rank}", 0): state for device, state in random_states(engine.device)}
    files = {f"rank-{mesh.rank:05d}.safetensors": tensors}
    if mesh.rank == 0:
        layers = training.balancer.state_dict()["layers"]
        files[BALANCE] = {f"{kind}:{name}": value for name, layer in layers.items() for kind, value in layer.items()}
    return files


def counters_of(training: TrainState, step: int) -> Counters:
    """What `state/training.json` says after `step`."""
    mesh, settings, state = training.engine.mesh, training.engine.settings, training.balancer.state_dict()
    return Counters(
        step=step,
        taken=state["taken"],
        controller=state["controller"],
        corpus=training.prepared.fingerprint,
        workers=mesh.world_size,
        expert_parallel=mesh.expert_parallel,
        zero_stage=settings.zero_stage,
        bf16=settings.bf16,
    )


def own_fragments(training: TrainState) -> list[TensorFragment]:
    """What this rank writes: what it holds, or its share of that where others hold the same."""
    engine = training.engine
    optimizer_fragments = engine.optimizer_fragments()
    if mapping_is_wrong(optimizer_fragments):
        raise CheckpointError(
            "DeepSpeed's optimizer does not hold what it says that it holds; leave out the further keys of "
            "train.deepspeed one by one, and report the one that does this"
        )
    if engine.settings.zero_stage == 0:
        optimizer_fragments = [share(one, engine.mesh) for one in optimizer_fragments]
    return tensor_fragments(optimizer_fragments, named_parameters(training.task.model, engine.mesh))


def share(optimizer_fragments: OptimizerFragment, mesh: Mesh) -> OptimizerFragment:
    """This rank's share of a parameter that is whole on every rank, or an expert's, on every rank that has it."""
    if getattr(optimizer_fragments.parameter, "allreduce", True):
        return optimizer_fragments.part(mesh.rank, mesh.world_size)
    return optimizer_fragments.part(mesh.edp_rank, mesh.world_size // mesh.expert_parallel)


def random_states(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """PyTorch's generators of the CPU and of the device that is computed on, by name, uint8 each."""
    yield "cpu", torch.get_rng_state()
    if device.type == "cuda":
        yield "cuda", torch.cuda.get_rng_state(device)


def seed_random(*words: int) -> None:
    """Begin PyTorch's random numbers, which dropout draws from, at a place that these numbers decide."""
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def read_counters(folder: Path) -> Counters:
    """CheckpointError for a file that is none."""
    path = folder / COUNTERS
    try:
        counters = Counters.model_validate_json(read_small(path))
        if counters.taken > counters.step:
            raise ValueError(f"{counters.taken} of {counters.step} steps were taken")
        return counters
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used ({first_line(error)}); use another checkpoint") from None


def restore(training: TrainState, folder: Path, counters: Counters) -> None:
    """Set optimizer, balancer, random states and counts of a run that has just begun with the folder's weights.

    Errors: CheckpointError where the folder lacks something, or is of other layers or of another kind of routing.
    """
    engine = training.engine
    with ShardReader(folder) as reader:
        found = tensor_fragments(engine.optimizer_fragments(), named_parameters(training.task.model, engine.mesh))
        if counters.taken:
            _restore_optimizer(engine, found, reader)
        _restore_masters(engine, found, reader, folder.with_name("model"))
        _restore_random(training, counters, reader)
    _restore_balance(training.balancer, folder, counters)
    engine.set_step_counters(counters.step, counters.taken)


def _restore_optimizer(engine: Engine, found: list[TensorFragment], reader: ShardReader) -> None:
    kinds = engine.settings.moments
    counts: dict[Tensor, set[float]] = {}
    for piece in found:
        state = engine.optimizer_state[piece.owner]
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(piece.owner, requires_grad=False)
            piece.of(state[kind]).copy_(reader.read(kind, piece.name, piece.start, piece.numel))
        if engine.settings.optimizer == "adamw":
            counts.setdefault(piece.owner, set()).add(float(reader.read(STEPS, piece.name, 0, 1)))
    for owner, found_counts in counts.items():
        if len(found_counts) != 1 or not 0 <= min(found_counts) < math.inf:
            told = f"tensors that are optimized together have made {sorted(found_counts)} steps"
            raise CheckpointError(f"{told}; use another checkpoint")
        engine.optimizer_state[owner][STEPS] = torch.tensor(found_counts.pop())


def _restore_masters(engine: Engine, found: list[TensorFragment], reader: ShardReader, model: Path) -> None:
    """The fp32 weights of the optimizer, where the model's are not: those that were kept, or those of an fp32 model."""
    if not engine.has_masters:
        return
    of_model: dict[str, list[TensorFragment]] = {}
    for piece in found:
        if reader.holds(MASTER, piece.name):
            piece.of(piece.owner).copy_(reader.read(MASTER, piece.name, piece.start, piece.numel))
        else:
            of_model.setdefault(piece.name, []).append(piece)
    for name, stored in stored_tensors(model, of_model):
        for piece in of_model[name]:
            piece.of(piece.owner).copy_(stored.reshape(-1)[piece.start : piece.start + piece.numel])


def _restore_random(training: TrainState, counters: Counters, reader: ShardReader) -> None:
    """Where the workers are as many as they were; else each begins anew, from a seed that this rank and step decide."""
    engine, mesh = training.engine, training.engine.mesh
    seed_random(training.config.run.seed, counters.step, mesh.rank)
    if counters.workers != mesh.world_size:
        return
    for device, _ in random_states(engine.device):
        if not reader.holds(RANDOM, f"{device}/{mesh.rank}"):
            continue
        state = reader.whole(RANDOM, f"{device}/{mesh.rank}")
        try:
            torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state, engine.device)
        except (TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the random state of rank {mesh.rank} is none of this PyTorch ({first_line(error)}); use the version "
                "that wrote it, or another checkpoint"
            ) from None


def read_balance(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What the balancer keeps of each layer, by kind; ValueError where it is none of that."""
    read_header(folder / BALANCE)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / BALANCE).items():
        kind, _, layer = name.partition(":")
        fits = value.dtype == (torch.int64 if kind == "last_load" else torch.float32) and value.dim() == 1
        if not fits or not bool(value.isfinite().all()):
            raise ValueError(f"{name[:200]!a} is {value.dtype} {list(value.shape)}, or not finite")
        layers.setdefault(layer, {})[kind] = value
    return layers


def _restore_balance(balancer: Balancer, folder: Path, counters: Counters) -> None:
    try:
        layers = read_balance(folder)
        for layer, router in balancer.routers.items():
            if any(value.shape != router.selection_bias.shape for value in layers.get(layer, {}).values()):
                raise ValueError(f"{layer} has another number of experts")
        balancer.load_state_dict({"taken": counters.taken, "controller": counters.controller, "layers": layers})
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder / BALANCE} cannot be used ({first_line(error)})") from None
