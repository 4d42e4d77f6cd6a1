"""The work of a rank in the tests of balancing in other loops: steps under DDP, FSDP2, DeepSpeed, and shared tokens."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dist_moe
from dist_moe.attach.balancer import Balancer
from dist_moe.engine.deepspeed import _clear_deepspeed, _forbid_compilation, _import_muon, _quieten, deepspeed
from dist_moe.errors import UserError
from dist_moe.probe.layers import find_layers
from dist_moe.probe.own_bias import find_own_bias
from tests.attached import EXPERTS, Received, make_model, tokens

RATE = 0.25
MICRO_BATCHES = 4
"""Of a step, over all ranks."""


class Trace(NamedTuple):
    """Steps of a rank.

    Attributes:
        counts: [step][L][E] of the load.
        received: [step][L][E], what the experts of this rank received.
        biases: [step][L] of the load.
        own: [L], the biases that the model has at the end, whole; empty without.
        shards: [L], elements of these on this rank.
    """

    counts: list[list[list[int]]]
    received: list[list[list[int]]]
    biases: list[list[Tensor]]
    own: list[Tensor]
    shards: list[int]


class Steps:
    """Collects the trace of a balanced model."""

    def __init__(self, model: nn.Module, balancer: Balancer) -> None:
        self.model, self.balancer, self.received = model, balancer, Received(model)
        self.counts: list[list[list[int]]] = []
        self.taken: list[list[list[int]]] = []
        self.biases: list[list[Tensor]] = []

    def end(self) -> None:
        """Keep what the balancer says of the last step."""
        load = self.balancer.load
        assert load is not None
        self.counts.append([list(counts) for counts in load.counts_LE])
        self.taken.append(self.received.take())
        self.biases.append([bias for bias in load.biases if bias is not None])

    def trace(self) -> Trace:
        """With the biases of the model, gathered."""
        found = [find_own_bias(layer) for layer in find_layers(self.model)]
        values = [getattr(own.owner, own.name) for own in found if own is not None]
        whole = [own.read() for own in found if own is not None]
        shards = [_elements_here(value) for value in values]
        return Trace(self.counts, self.taken, self.biases, [each for each in whole if each is not None], shards)


def _elements_here(value: Any) -> int:
    if hasattr(value, "ds_tensor"):
        return int(value.ds_tensor.numel())
    return int((value.to_local() if isinstance(value, DTensor) else value).numel())


def forwards(rank: int, world_size: int, family: str, steps: int = 3) -> Trace:
    """Steps on this rank's share of the micro-batches, without training, so that no rounding changes a selection."""
    model = make_model(family)
    balancer = dist_moe.balance(model, rate=RATE)
    collected = Steps(model, balancer)
    for step in range(steps):
        for batch in range(rank, MICRO_BATCHES, world_size):
            model(input_ids=tokens(10 * step + batch))
        balancer.step()
        collected.end()
    return collected.trace()


def trained_by_ddp(rank: int, world_size: int, family: str) -> Trace:
    """Three optimizer steps of two micro-batches under DistributedDataParallel, with recomputation."""
    inner: Any = make_model(family)
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    balancer = dist_moe.balance(model, rate=RATE)
    balancer.attach(optimizer)
    collected = Steps(inner, balancer)
    for step in range(3):
        received = []
        for micro in range(2):
            batch = tokens(100 * rank + 10 * step + micro)
            loss = model(input_ids=batch, labels=batch).loss
            received.append(collected.received.take())
            loss.backward()
            collected.received.take()  # of the recomputation
        optimizer.step()
        optimizer.zero_grad()
        collected.end()
        collected.taken[-1] = [
            [a + b for a, b in zip(first, second, strict=True)] for first, second in zip(*received, strict=True)
        ]
    return collected.trace()


def sharded_by_fsdp(rank: int, world_size: int, family: str, start: float) -> tuple[Trace, list[list[int]]]:
    """Three steps of a model whose bias starts at `start` times the expert, and a forward with expert 3 raised."""
    model: Any = make_model(family)
    for layer in find_layers(model):
        own = find_own_bias(layer)
        if own is not None:
            own.write(start * torch.arange(EXPERTS))
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    balancer = dist_moe.balance(model, rate=RATE)
    balancer.attach(optimizer)
    collected = Steps(model, balancer)
    for step in range(3):
        batch = tokens(100 * rank + step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        collected.end()
    trace = collected.trace()
    state = balancer.state_dict()
    for layer_state in state["layers"].values():
        layer_state["selection_bias"][3] += 100.0
    balancer.load_state_dict(state)
    model(input_ids=tokens(rank))
    return trace, collected.received.take()


def message(balancer: Balancer) -> str:
    """What a step is refused with; empty where it is not."""
    try:
        balancer.step()
    except UserError as error:
        return str(error)
    return ""


def unequal_layers(rank: int, world_size: int) -> tuple[str, list[int]]:
    """A step of ranks with different layers: the refusal, and the load with a group of the rank alone."""
    groups = [dist.new_group([member]) for member in range(world_size)]
    refused = []
    for group in (None, groups[rank]):
        model = make_model(num_hidden_layers=1 + rank)
        balancer = dist_moe.balance(model, group=group)
        model(input_ids=tokens(rank, rows=1 + rank))
        refused.append(message(balancer))
    assert not refused[1] and balancer.load is not None
    return refused[0], [sum(counts) for counts in balancer.load.counts_LE]


def without_tokens(rank: int, world_size: int) -> tuple[str, str, list[int]]:
    """A step of which no rank has tokens, and one of which rank 0 alone has some."""
    model = make_model()
    balancer = dist_moe.balance(model)
    nowhere = message(balancer)
    if rank == 0:
        model(input_ids=tokens(0))
    one_rank = message(balancer)
    assert balancer.load is not None
    return nowhere, one_rank, [sum(counts) for counts in balancer.load.counts_LE]


def shared_tokens(rank: int, world_size: int, shape: tuple[int, ...], with_group: bool) -> Trace:
    """Ranks of a mesh whose last dimension is tensor parallelism, and which share their tokens along it."""
    names = ("tp",) if len(shape) == 1 else ("dp", "tp")
    model = make_model()
    vars(model).update(_device_mesh=init_device_mesh("cpu", shape, mesh_dim_names=names), _tp_size=shape[-1])
    group = dist.new_group(list(range(world_size))) if with_group else None
    balancer = dist_moe.balance(model, rate=RATE, group=group)
    collected = Steps(model, balancer)
    for step in range(2):
        model(input_ids=tokens(10 * step + rank // shape[-1]))
        balancer.step()
        collected.end()
    return collected.trace()


@contextlib.contextmanager
def deepspeed_engine(model: nn.Module, stage: int) -> Iterator[Any]:
    """An engine of DeepSpeed of two micro-batches; every parameter is partitioned at stage 3."""
    _quieten()
    _forbid_compilation()
    _import_muon()
    deepspeed.init_distributed(verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    try:
        yield engine
    finally:
        engine.destroy()
        _clear_deepspeed()


def trained_by_deepspeed(rank: int, world_size: int, family: str, stage: int, folder: str) -> tuple[Trace, Trace]:
    """Three steps, with a checkpoint after the second; and the third once more, from the checkpoint."""
    model = make_model(family)
    with deepspeed_engine(model, stage) as engine:
        balancer = dist_moe.balance(engine, "momentum", rate=RATE)
        balancer.attach(engine)
        collected = Steps(model, balancer)

        def step(number: int) -> None:
            for micro in range(2):
                batch = tokens(100 * rank + 10 * number + micro)
                engine.backward(engine(input_ids=batch, labels=batch).loss)
                engine.step()
            collected.end()

        for number in range(2):
            step(number)
        engine.save_checkpoint(folder)
        step(2)
        first = collected.trace()
        collected.counts, collected.taken, collected.biases = [], [], []
        engine.load_checkpoint(folder)
        step(2)
        return first, collected.trace()


def poisoned(rank: int, world_size: int, stage: int) -> list[bool]:
    """Three steps, the second with a NaN in the gradients of one rank: which of them the balancer took."""
    model = make_model()
    with deepspeed_engine(model, stage) as engine:
        balancer = dist_moe.balance(engine)
        balancer.attach(engine)
        taken: list[bool] = []
        balancer.listen(lambda load: taken.append(load.taken))
        for step in range(3):
            for micro in range(2):
                batch = tokens(100 * rank + 10 * step + micro)
                factor = float("nan") if step == 1 and rank == 1 else 1.0
                engine.backward(factor * engine(input_ids=batch, labels=batch).loss)
                engine.step()
        return taken
