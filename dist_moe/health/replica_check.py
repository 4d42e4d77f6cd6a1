"""Finds a rank that does not hold what it has to hold alike with others, bit by bit.

Biases and everything dense are the same on all ranks, and experts on all ranks of their column of the mesh; ZeRO 1
and 2 keep it so by gathering the weights after each step. A broken memory or a library's mistake lets one rank go its
own way, and no loss tells: each rank trains on, and the checkpoint is rank 0's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from dist_moe.comm.mesh import Mesh
from dist_moe.comm.reduce import all_gather_objects, all_reduce_counts
from dist_moe.engine.train_state import TrainState
from dist_moe.errors import UserError

SHOWN = 4


class ReplicaError(UserError, RuntimeError):
    """Ranks differ in what they hold alike; the message names the rank that stands alone, and the tensors."""


def check_replicas(training: TrainState, step: int, begun: int = 0) -> None:
    """Compare after `step` where `observe.replica_check_interval` asks for it; a collective call.

    begun: the step after which this process began. Two numbers of each rank travel, in one all-reduce; names and
    digests of tensors only where those differ. Errors: ReplicaError, on all ranks alike.
    """
    every, mesh = training.config.observe.replica_check_interval, training.engine.mesh
    if not every or step % every or mesh.world_size == 1:
        return
    dense, experts = digests(training)
    own = torch.zeros(mesh.world_size, 2, dtype=torch.int64)
    own[mesh.rank] = torch.tensor([combined(dense), combined(experts)])
    (found,) = all_reduce_counts([own], training.engine.device)
    if all(len(set(part)) == 1 for part in _alike(found.tolist(), mesh)):
        return
    answers = all_gather_objects((dense, experts))
    before = f"after step {step - every} they were alike" if step - every > begun else "they were not compared before"
    raise ReplicaError(
        f"after step {step} ranks differ in what they hold alike: {'; '.join(_words(answers, mesh))}; {before}; "
        "go on from a checkpoint of before (checkpoint.resume), without the host of that rank, or with its memory "
        "tested; observe.replica_check_interval says how often ranks are compared"
    )


def digests(training: TrainState) -> tuple[dict[str, int], dict[str, int]]:
    """What this rank holds alike with all ranks, and with those that have the same experts: digest by name."""
    dense: dict[str, int] = {"balance: steps taken": training.balancer.taken}
    experts: dict[str, int] = {}
    for name, parameter in training.task.named_parameters():
        kind = dense if getattr(parameter, "allreduce", True) else experts
        kind[name] = digest(parameter)
    for name, layer in training.balancer.state_dict()["layers"].items():
        dense |= {f"{name}.{kind}": digest(value) for kind, value in layer.items()}
    return dense, experts


def digest(tensor: Tensor) -> int:
    """XXH3 of a tensor's bits, as int64: a bit more or less is another number, whatever the values mean."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
    return xxhash.xxh3_64_intdigest(content) - (1 << 63)


def combined(found: Mapping[str, int]) -> int:
    """One int64 for all of them."""
    return xxhash.xxh3_64_intdigest(repr(sorted(found.items())).encode()) - (1 << 63)


def _alike(found: Sequence[Sequence[int]], mesh: Mesh) -> Iterator[list[int]]:
    """The numbers that have to be one: those of the dense on all ranks, of the experts on each column."""
    yield [row[0] for row in found]
    for place in range(mesh.expert_parallel):
        yield [row[1] for row in found[place :: mesh.expert_parallel]]


def _words(answers: Sequence[tuple[dict[str, int], dict[str, int]]], mesh: Mesh) -> Iterator[str]:
    """Of each set of ranks that has to be alike: who stands alone, in which tensors."""
    ranks = range(mesh.world_size)
    columns = [(1, ranks[place :: mesh.expert_parallel]) for place in range(mesh.expert_parallel)]
    for part, column in [(0, ranks), *columns]:
        held = {rank: answers[rank][part] for rank in column}
        first = held[column[0]]
        names = [name for name in first if len({one.get(name) for one in held.values()}) > 1]
        if names:
            tensors = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            yield f"{_who(held, names)} in {tensors}"


def _who(held: Mapping[int, Mapping[str, int]], names: Sequence[str]) -> str:
    values = {rank: tuple(one.get(name) for name in names) for rank, one in held.items()}
    (most, count), *_ = Counter(values.values()).most_common(1)
    if count * 2 > len(values):
        alone = [str(rank) for rank, value in values.items() if value != most]
        return f"rank {', '.join(alone)} differs from the {count} others"
    return f"ranks {', '.join(map(str, values))} differ, and none of them has more than half on its side"
