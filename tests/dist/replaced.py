"""The work of a rank in the tests of models whose experts or routers are replaced in a script."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_moe
from dist_moe.errors import UserError
from dist_moe.replace.experts import placed_layers
from tests.attached import make_model, tokens

STEPS, MICRO_BATCHES, RATE = 3, 4, 0.25
FORWARDS = 8
MAX_NORM = 0.05
"""Below the norm of every gradient."""


class Run(NamedTuple):
    """Steps of a rank.

    Attributes:
        losses: [step] of the whole batch.
        norms: [step] of the gradients, before they are clipped.
        counts: [step][L][E] of the load.
        held: Experts of this rank in a layer.
    """

    losses: list[float]
    norms: list[float]
    counts: list[tuple[tuple[int, ...], ...]]
    held: int


def trained(
    rank: int, world_size: int, family: str, expert_parallel: int, wrapper: str, folder: str, clipped: bool = False
) -> Run:
    """Train a model with distributed experts, and save it."""
    model = dist_moe.parallelize(make_model(family), expert_parallel)
    held = max((len(parameter) for parameter in dist_moe.expert_parameters(model)), default=0)
    found = _steps(_wrapped(model, wrapper), rank, world_size, clipped)
    dist_moe.save_pretrained(model, folder)
    return Run(*found, held)


def trained_whole(rank: int, world_size: int, family: str, folder: str, clipped: bool = False) -> Run:
    """Train the model of transformers on one rank, and save it."""
    model: Any = make_model(family)
    found = _steps(model, rank, world_size, clipped)
    model.save_pretrained(folder)
    return Run(*found, 0)


def _steps(model: nn.Module, rank: int, world_size: int, clipped: bool) -> tuple[list[float], list[float], Any]:
    balancer = dist_moe.balance(model, "loss_free", rate=RATE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    balancer.attach(optimizer)
    losses, norms, counts = [], [], []
    for step in range(STEPS):
        total = torch.zeros(())
        mine = range(rank, MICRO_BATCHES, world_size)
        for index in mine:
            batch = tokens(MICRO_BATCHES * step + index)
            loss: Tensor = model(input_ids=batch, labels=batch).loss
            (loss / len(mine)).backward()
            total += loss.detach() / MICRO_BATCHES
        if world_size > 1:
            dist.all_reduce(total)
        norms.append(_clip(model, MAX_NORM if clipped else 1e9))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        assert balancer.load is not None
        counts.append(balancer.load.counts_LE)
    return losses, norms, counts


def _clip(model: nn.Module, max_norm: float) -> float:
    inner: nn.Module = getattr(model, "module", model)
    if placed_layers(inner):
        return float(dist_moe.clip_grad_norm_(model, max_norm))
    return float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))


def _wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params=set(dist_moe.expert_parameters(model)))
    return model


class Around(nn.Module):
    """A module of a script around the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss


def misused(rank: int, world_size: int, how: str) -> str:
    """What is said of a way to train that would mix the experts of ranks, or let the dense weights differ."""
    model = dist_moe.parallelize(make_model())
    batch = tokens(rank)
    try:
        if how == "wrapped":
            DistributedDataParallel(Around(model))(batch)
        elif how == "sharded":
            fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
            model(input_ids=batch)
        elif how == "state":
            state = [model.state_dict()]
            dist.broadcast_object_list(state)
            model.load_state_dict(state[0])
        elif how == "saved":
            model.save_pretrained("unused")  # type: ignore[operator]
        else:
            _clip_locally(DistributedDataParallel(model), batch)
    except (UserError, RuntimeError) as error:
        return str(error)
    return ""


def _clip_locally(model: nn.Module, batch: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(FORWARDS):
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()


def loaded(rank: int, world_size: int, folder: str, out: str) -> tuple[Tensor, list[int]]:
    """The logits of a folder with distributed experts, saved again; and the experts of this rank in each layer."""
    model = dist_moe.from_pretrained(folder)
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens(0)).logits
    dist_moe.save_pretrained(model, out)
    return logits, [len(next(layer.local.parameters())) for layer in placed_layers(model).values()]


def routed(rank: int, world_size: int, expert_parallel: int, folder: str) -> Run:
    """Train with threshold routing and adaptive weights, with distributed experts."""
    model = dist_moe.parallelize(make_model(), expert_parallel) if world_size > 1 else make_model()
    dist_moe.route(model, "threshold", threshold=0.4, target_experts_per_token=2.0)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    balancer = dist_moe.balance(wrapped, "adaptive_weight", rate=RATE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    balancer.attach(optimizer)
    losses, counts = [], []
    for step in range(STEPS):
        for index in range(rank, MICRO_BATCHES, world_size):
            batch = tokens(MICRO_BATCHES * step + index)
            loss = wrapped(input_ids=batch, labels=batch).loss
            (loss * world_size / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        assert balancer.load is not None
        counts.append(balancer.load.counts_LE)
    dist_moe.save_pretrained(model, folder)
    return Run(losses, [], counts, 0)


def trained_later(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """The gradient of experts of this rank that were frozen when they were distributed, and that of the whole model."""
    whole, frozen = make_model(), make_model().requires_grad_(False)
    model = dist_moe.parallelize(frozen)
    (name, weight), *_ = ((n, p) for n, p in model.named_parameters() if n.endswith("gate_up_proj"))
    weight.requires_grad_(True)
    model(input_ids=tokens(rank), labels=tokens(rank)).loss.backward()
    for index in range(world_size):
        (whole(input_ids=tokens(index), labels=tokens(index)).loss / world_size).backward()
    wanted = whole.get_parameter(name.replace(".local.", ".")).grad
    assert weight.grad is not None and wanted is not None
    return weight.grad, wanted.chunk(world_size)[rank]


def saved_into(rank: int, world_size: int, folder: str) -> str:
    """What is said of a folder that cannot be written."""
    try:
        dist_moe.save_pretrained(dist_moe.parallelize(make_model()), folder)
    except UserError as error:
        return str(error)
    return ""


def saved_while_sharded(rank: int, world_size: int) -> str:
    """What is said of a routed model under FSDP2, which trains."""
    model = dist_moe.route(make_model())
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    model(input_ids=tokens(rank), labels=tokens(rank)).loss.backward()
    try:
        dist_moe.save_pretrained(model, "unused")
    except UserError as error:
        return str(error)
    return ""


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
