"""Detects a rank whose replicated state diverges from the other ranks', by checksum.

Biases and dense weights are replicated on all ranks, and experts on all ranks of one column of the mesh; ZeRO 1 and 2
gather the weights after each step. Faulty memory or a library defect can make one rank diverge without any sign in the
loss, while checkpoints take the dense weights from rank 0.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from dist_moe.comm.mesh import Mesh
from dist_moe.comm.objects import all_gather_objects
from dist_moe.comm.reduce import all_reduce_counts
from dist_moe.errors import UserError
from dist_moe.text import listed

if TYPE_CHECKING:
    from dist_moe.engine.train_state import TrainState  # loads DeepSpeed

SHOWN = 4


class ReplicaError(UserError, RuntimeError):
    """Replicas differ; the message names the rank that diverged, and the tensors."""


def check_replicas(state: "TrainState", step: int, steps_done: int = 0) -> None:
    """Compare the replicas after every `observe.replica_check_interval` steps. A collective call.

    One all-reduce of two numbers per rank; the digests of the tensors are gathered only where these differ.

    Args:
        state: The run's state.
        step: The step, from 1.
        steps_done: Optimizer steps before this process began.

    Raises:
        ReplicaError: Replicas differ; raised on every rank.
    """
    interval, mesh = state.config.observe.replica_check_interval, state.engine.mesh
    if not interval or step % interval or mesh.world_size == 1:
        return
    dense, experts = digests(state)
    own = torch.zeros(mesh.world_size, 2, dtype=torch.int64)
    own[mesh.rank] = torch.tensor([combine(dense), combine(experts)])
    (combined,) = all_reduce_counts([own], state.engine.device)
    if all(len(set(part)) == 1 for part in _replicas(combined.tolist(), mesh)):
        return
    answers = all_gather_objects((dense, experts), tuple[dict[str, int], dict[str, int]])
    before = (
        f"they were equal after step {step - interval}"
        if step - interval > steps_done
        else "they were not compared before"
    )
    raise ReplicaError(
        f"replicas differ after step {step}: {'; '.join(_differences(answers, mesh))}; {before}; resume from an "
        "earlier checkpoint (checkpoint.resume), without the host of that rank or after a memory test of it; "
        "observe.replica_check_interval sets how often replicas are compared"
    )


def digests(state: "TrainState") -> tuple[dict[str, int], dict[str, int]]:
    """Return the digests, by name, of what is replicated on all ranks, and on the ranks with the same experts."""
    dense: dict[str, int] = {"balance: steps taken": state.balancer.steps_taken}
    experts: dict[str, int] = {}
    for name, parameter in state.task.named_parameters():
        kind = dense if getattr(parameter, "allreduce", True) else experts
        kind[name] = digest(parameter)
    for name, layer in state.balancer.state_dict()["layers"].items():
        dense |= {f"{name}.{kind}": digest(value) for kind, value in layer.items()}
    return dense, experts


def digest(tensor: Tensor) -> int:
    """Return XXH3-64 of a tensor's bits, as int64."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
    return xxhash.xxh3_64_intdigest(content) - (1 << 63)


def combine(digests_by_name: Mapping[str, int]) -> int:
    """Return one int64 for all digests."""
    return xxhash.xxh3_64_intdigest(repr(sorted(digests_by_name.items())).encode()) - (1 << 63)


def _replicas(found: Sequence[Sequence[int]], mesh: Mesh) -> Iterator[list[int]]:
    """Yield the digests that must be equal: the dense ones of all ranks, then the experts' of each column."""
    yield [row[0] for row in found]
    for place in range(mesh.expert_parallel):
        yield [row[1] for row in found[place :: mesh.expert_parallel]]


def _differences(answers: Sequence[tuple[dict[str, int], dict[str, int]]], mesh: Mesh) -> Iterator[str]:
    """Yield, for each set of ranks that must be equal and is not, the rank that diverged and the tensors."""
    ranks = range(mesh.world_size)
    columns = [(1, ranks[place :: mesh.expert_parallel]) for place in range(mesh.expert_parallel)]
    for part, column in [(0, ranks), *columns]:
        held = {rank: answers[rank][part] for rank in column}
        first = held[column[0]]
        names = [name for name in first if len({one.get(name) for one in held.values()}) > 1]
        if names:
            tensors = listed(names, last="and", most=SHOWN)
            yield f"{_diverged(held, names)} in {tensors}"


def _diverged(held: Mapping[int, Mapping[str, int]], names: Sequence[str]) -> str:
    values = {rank: tuple(digests_by_name.get(name) for name in names) for rank, digests_by_name in held.items()}
    (majority, count), *_ = Counter(values.values()).most_common(1)
    if count * 2 > len(values):
        diverged = [str(rank) for rank, value in values.items() if value != majority]
        return f"rank {', '.join(diverged)} differs from the {count} others"
    return f"ranks {', '.join(map(str, values))} differ, and there is no majority"
