"""What resuming needs besides the weights: moments, balance, random states and counters, independent of the layout.

state/rank-NNNNN.safetensors holds the elements of one rank's optimizer and its random states;
state/balance.safetensors the balancer's state of each layer; state/training.json the counters.
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

from dist_moe.balancing.balancer import Balancer
from dist_moe.checkpoint.errors import USE_ANOTHER, CheckpointError
from dist_moe.checkpoint.format.hf_folder import read_tensors
from dist_moe.checkpoint.format.hf_weights import names_in_files
from dist_moe.checkpoint.format.manifest import read_strict_json, reason_in_file
from dist_moe.checkpoint.format.model_tensors import parameter_slices
from dist_moe.checkpoint.format.shard_reader import RANDOM, ShardReader
from dist_moe.checkpoint.format.tensor_header import read_header
from dist_moe.comm.mesh import Mesh
from dist_moe.engine.deepspeed import Engine
from dist_moe.engine.optimizer_shards import (
    MASTER,
    STEPS,
    OptimizerFragment,
    TensorFragment,
    mapping_is_wrong,
    optimizer_tensors,
    shard_key,
    tensor_fragments,
)
from dist_moe.engine.train_state import TrainState
from dist_moe.section import Section

BALANCE_FILE = "balance.safetensors"
COUNTERS_FILE = "training.json"


class Counters(Section):
    """The content of state/training.json.

    Attributes:
        step: Optimizer steps done.
        taken: Steps that were not skipped.
        controller: State of the controller that holds the target of experts per token; None without one.
        corpus: Fingerprint of the text.
        workers, expert_parallel, zero_stage, bf16: The layout and precision that wrote the checkpoint. A run that
            resumes from it may use others.
    """

    step: int = Field(ge=0)
    taken: int = Field(ge=0)
    controller: tuple[float, float, float, float] | None
    corpus: str
    workers: int
    expert_parallel: int
    zero_stage: int
    bf16: bool


def state_tensors(train_state: TrainState) -> dict[str, dict[str, Tensor]]:
    """This rank's tensors of `state/`, by file and name; mostly views. Rank 0 adds the balancer's state."""
    engine, mesh = train_state.engine, train_state.engine.mesh
    fragments = [fragment for fragment in rank_fragments(train_state) if fragment.numel]
    tensors = dict(optimizer_tensors(fragments, engine.optimizer_state, engine.has_masters))
    tensors |= {shard_key(RANDOM, f"{device}/{mesh.rank}", 0): state for device, state in rng_states(engine.device)}
    files = {f"rank-{mesh.rank:05d}.safetensors": tensors}
    if mesh.rank == 0:
        layers = train_state.balancer.state_dict()["layers"]
        files[BALANCE_FILE] = {
            f"{kind}:{name}": value for name, layer in layers.items() for kind, value in layer.items()
        }
    return files


def counters_of(train_state: TrainState, step: int) -> Counters:
    """The counters of the run after `step`."""
    mesh, settings, state = train_state.engine.mesh, train_state.engine.settings, train_state.balancer.state_dict()
    return Counters(
        step=step,
        taken=state["taken"],
        controller=state["controller"],
        corpus=train_state.data.fingerprint,
        workers=mesh.world_size,
        expert_parallel=mesh.expert_parallel,
        zero_stage=settings.zero_stage,
        bf16=settings.bf16,
    )


def rank_fragments(train_state: TrainState) -> list[TensorFragment]:
    """The fragments that this rank writes; where several ranks hold the same, each writes a part of it.

    Raises:
        CheckpointError: DeepSpeed's optimizer holds other weights than its address mapping says.
    """
    engine = train_state.engine
    fragments = engine.optimizer_fragments()
    if mapping_is_wrong(fragments):
        raise CheckpointError(
            "DeepSpeed's optimizer does not hold the weights that its mapping names; remove the keys of "
            "train.deepspeed one by one, and report the one that causes this"
        )
    if engine.settings.zero_stage == 0:
        fragments = [rank_shard(fragment, engine.mesh) for fragment in fragments]
    return tensor_fragments(fragments, parameter_slices(train_state.task.model, engine.mesh))


def rank_shard(fragment: OptimizerFragment, mesh: Mesh) -> OptimizerFragment:
    """This rank's part of a parameter that every rank holds, or, for an expert, every rank of its replica group."""
    # DeepSpeed's tag of dense parameters; experts have allreduce=False.
    if getattr(fragment.parameter, "allreduce", True):
        return fragment.shard(mesh.rank, mesh.world_size)
    return fragment.shard(mesh.edp_rank, mesh.world_size // mesh.expert_parallel)


def rng_states(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, state as uint8) of PyTorch's generators of the CPU and of the compute device."""
    yield "cpu", torch.get_rng_state()
    if device.type == "cuda":
        yield "cuda", torch.cuda.get_rng_state(device)


def seed_rng(*entropy: int) -> None:
    """Seed PyTorch's generators, which dropout uses, from a hash of these numbers."""
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def read_counters(folder: Path) -> Counters:
    """Read training.json of the `state` folder.

    Raises:
        CheckpointError: The file is missing or invalid.
    """
    path = folder / COUNTERS_FILE
    try:
        counters = Counters.model_validate_json(read_strict_json(path))
        if counters.taken > counters.step:
            raise ValueError(f"taken={counters.taken} is more than step={counters.step}")
        return counters
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used ({reason_in_file(error)}); {USE_ANOTHER}") from None


def restore_state(train_state: TrainState, folder: Path, counters: Counters) -> list[str]:
    """Restore optimizer, balancer, random states and counters of a run that has loaded the checkpoint's weights.

    Args:
        train_state: The started run.
        folder: The checkpoint's `state` folder.
        counters: Read from it.

    Returns:
        Lines for the log.

    Raises:
        CheckpointError: The folder lacks something, or belongs to other layers or another kind of routing.
    """
    engine = train_state.engine
    with ShardReader(folder) as reader:
        slices = parameter_slices(train_state.task.model, engine.mesh)
        fragments = tensor_fragments(engine.optimizer_fragments(), slices)
        if counters.taken:
            _restore_optimizer(engine, fragments, reader)
        _restore_masters(engine, fragments, reader, folder.with_name("model"))
        _restore_rng(train_state, counters, reader)
    notes = _restore_balance(train_state.balancer, folder, counters)
    engine.set_step_counters(counters.step, counters.taken)
    return notes


def _restore_optimizer(engine: Engine, fragments: list[TensorFragment], reader: ShardReader) -> None:
    kinds = engine.settings.moments
    step_counts: dict[Tensor, set[float]] = {}
    for fragment in fragments:
        state = engine.optimizer_state[fragment.optimizer_tensor]
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(fragment.optimizer_tensor, requires_grad=False)
            stored = reader.read(kind, fragment.name, fragment.start, fragment.numel)
            fragment.view_of(state[kind]).copy_(stored)
        if engine.settings.optimizer == "adamw":
            steps = float(reader.read(STEPS, fragment.name, 0, 1))
            step_counts.setdefault(fragment.optimizer_tensor, set()).add(steps)
    for optimizer_tensor, counts in step_counts.items():
        # ZeRO flattens many tensors into one, with one step count.
        if len(counts) != 1 or not 0 <= min(counts) < math.inf:
            raise CheckpointError(
                f"tensors that share one optimizer state have step counts {sorted(counts)}; use another checkpoint"
            )
        # On the device of the moments: a fused optimizer counts there.
        engine.optimizer_state[optimizer_tensor][STEPS] = torch.tensor(counts.pop(), device=optimizer_tensor.device)


def _restore_masters(engine: Engine, fragments: list[TensorFragment], reader: ShardReader, model: Path) -> None:
    """Restore the fp32 master weights: those that were stored, or else the weights of an fp32 checkpoint."""
    if not engine.has_masters:
        return
    from_model: dict[str, list[TensorFragment]] = {}
    for fragment in fragments:
        if reader.has(MASTER, fragment.name):
            stored = reader.read(MASTER, fragment.name, fragment.start, fragment.numel)
            fragment.view_of(fragment.optimizer_tensor).copy_(stored)
        else:
            from_model.setdefault(fragment.name, []).append(fragment)
    in_files = names_in_files(model) if from_model else {}
    ours = {in_files.get(name, name): name for name in from_model}
    for name, weight in read_tensors(model, ours):
        for fragment in from_model[ours[name]]:
            stored = weight.reshape(-1)[fragment.start : fragment.start + fragment.numel]
            fragment.view_of(fragment.optimizer_tensor).copy_(stored)


def _restore_rng(train_state: TrainState, counters: Counters, reader: ShardReader) -> None:
    """Restore the random states if the number of workers is the same; else seed from run.seed, step and rank."""
    engine, mesh = train_state.engine, train_state.engine.mesh
    seed_rng(train_state.config.run.seed, counters.step, mesh.rank)
    if counters.workers != mesh.world_size:
        return
    for device, _ in rng_states(engine.device):
        if not reader.has(RANDOM, f"{device}/{mesh.rank}"):
            continue
        state = reader.read_all(RANDOM, f"{device}/{mesh.rank}")
        try:
            torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state, engine.device)
        except (TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the random state of rank {mesh.rank} is invalid for this PyTorch ({reason_in_file(error)}); use the "
                "version that wrote it, or another checkpoint"
            ) from None


def read_balance(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the balancer's state from the `state` folder.

    Returns:
        By layer and kind: `selection_bias` fp32 [E], `last_load` int64 [E], `memory.NAME` fp32 [E].

    Raises:
        CheckpointError: The file is invalid.
        ValueError: A tensor has another dtype or more dimensions, is not finite, or is a load below 0.
    """
    read_header(folder / BALANCE_FILE)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / BALANCE_FILE).items():
        kind, _, layer = name.partition(":")
        valid = value.dtype == (torch.int64 if kind == "last_load" else torch.float32) and value.dim() == 1
        if not valid or not bool(value.isfinite().all()):
            raise ValueError(f"{name[:200]!a} is {value.dtype} {list(value.shape)}, or not finite")
        if value.dtype == torch.int64 and value.numel() and int(value.min()) < 0:
            raise ValueError(f"{name[:200]!a} holds {int(value.min())}, and a load is never negative")
        layers.setdefault(layer, {})[kind] = value
    return layers


def _restore_balance(balancer: Balancer, folder: Path, counters: Counters) -> list[str]:
    try:
        layers = read_balance(folder)
        for layer, router in balancer.routers.items():
            if any(value.shape != router.selection_bias.shape for value in layers.get(layer, {}).values()):
                raise ValueError(f"{layer} has another number of experts")
        return balancer.load_state_dict({"taken": counters.taken, "controller": counters.controller, "layers": layers})
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = reason_in_file(error)
        raise CheckpointError(f"{folder / BALANCE_FILE} cannot be used ({reason}); {USE_ANOTHER}") from None
