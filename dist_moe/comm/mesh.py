"""The mesh: which ranks hold which experts, as one frozen value that is passed by argument."""

import itertools
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from dist_moe.comm.reduce import all_gather_objects
from dist_moe.errors import UserError


class MeshError(UserError, ValueError):
    """A mesh that cannot be laid out (value, rule and remedy in the message)."""


@dataclass(frozen=True)
class Mesh:
    """Ranks laid out as expert_data_parallel x expert_parallel, the expert-parallel axis innermost.

    Rank r sits at (r // expert_parallel, r % expert_parallel). The ranks of one row exchange tokens and hold
    different experts; the ranks of one column hold the same experts (DeepSpeed orders its groups the same way).
    `ep_group` is the process group of this rank's row, None where expert_parallel is 1. `nodes`: how the row lies on
    several hosts, None where it does not or where tokens are to travel as if it did not.
    """

    world_size: int
    rank: int
    expert_parallel: int
    ep_group: dist.ProcessGroup | None = None
    nodes: "NodeGroups | None" = None

    def __post_init__(self) -> None:
        if self.expert_parallel < 1 or self.world_size % self.expert_parallel:
            raise MeshError(
                f"parallel.expert_parallel={self.expert_parallel} does not divide the {self.world_size} workers; "
                f"use one of {divisors(self.world_size)}"
            )

    @property
    def ep_rank(self) -> int:
        """Place on the expert-parallel axis: which slice of the experts is here."""
        return self.rank % self.expert_parallel

    @property
    def edp_rank(self) -> int:
        """Place on the expert-data-parallel axis: which replica of that slice this is."""
        return self.rank // self.expert_parallel

    def local_experts(self, experts: int) -> range:
        """The global ids of the experts that this rank holds, out of `experts`. Errors: experts not divisible."""
        if experts % self.expert_parallel:
            fits = [n for n in divisors(self.world_size) if experts % n == 0]
            raise MeshError(
                f"parallel.expert_parallel={self.expert_parallel} does not divide the model's {experts} experts; "
                f"use one of {fits}"
            )
        local = experts // self.expert_parallel
        return range(self.ep_rank * local, (self.ep_rank + 1) * local)


@dataclass(frozen=True)
class NodeGroups:
    """An expert-parallel row of N hosts with G ranks each, seen from one rank.

    between: the N ranks with its place on their hosts, one of each host. within: the G ranks of its host.
    """

    inter: Mesh
    intra: Mesh


def make_mesh(expert_parallel: int, ranks_per_node: int = 0) -> Mesh:
    """Lay the joined world out and create every row's process groups (a collective call: all ranks make it).

    ranks_per_node: where rows lie on several hosts with so many consecutive ranks each, tokens travel in two hops; 0:
    in one.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mesh = Mesh(world_size, rank, expert_parallel)
    if expert_parallel == 1:
        return mesh
    rows = [range(start, start + expert_parallel) for start in range(0, world_size, expert_parallel)]
    groups = [dist.new_group(list(row)) for row in rows]
    nodes = None
    if ranks_per_node:
        nodes = [_make_node_groups(row, ranks_per_node, rank) for row in rows][mesh.edp_rank]
    return Mesh(world_size, rank, expert_parallel, groups[mesh.edp_rank], nodes)


def ranks_per_node(exchange: str, expert_parallel: int) -> int:
    """What `make_mesh` is to be told for `parallel.all_to_all`, from where the ranks are (a collective call).

    Errors: MeshError for "hierarchical" where rows do not lie on several hosts, the same number of ranks on each.
    """
    if exchange == "flat" or expert_parallel == 1:
        return 0
    hosts = hosts_of_ranks()
    found = block_of_hosts(hosts, expert_parallel)
    if found == 0 and exchange == "hierarchical":
        raise MeshError(
            f"parallel.all_to_all=hierarchical needs rows of {expert_parallel} workers that lie on several hosts, "
            f"as many on each, and they lie on {', '.join(hosts)}; use auto or flat"
        )
    return found


def hosts_of_ranks() -> list[str]:
    """The name of each rank's host (a collective call)."""
    return all_gather_objects(socket.gethostname())


def block_of_hosts(hosts: Sequence[str], expert_parallel: int) -> int:
    """How many consecutive ranks of one host every row is made of; 0 where there is no such number below a row's.

    hosts: that of each rank.
    """
    rows = [hosts[start : start + expert_parallel] for start in range(0, len(hosts), expert_parallel)]
    blocks = [[(host, len(list(ranks))) for host, ranks in itertools.groupby(row)] for row in rows]
    sizes = {size for row in blocks for _, size in row}
    apart = all(len({host for host, _ in row}) == len(row) for row in blocks)
    size = sizes.pop()
    return size if not sizes and apart and size < expert_parallel else 0


def _make_node_groups(row: range, per_node: int, rank: int) -> NodeGroups | None:
    """Every rank makes all groups of a row, in the same order; None for a rank of another row."""
    count = len(row) // per_node
    inter = [dist.new_group(list(row[place::per_node])) for place in range(per_node)]
    intra = [dist.new_group(list(row[node * per_node : (node + 1) * per_node])) for node in range(count)]
    if rank not in row:
        return None
    node, place = divmod(rank - row.start, per_node)
    inside = Mesh(per_node, place, per_node, intra[node] if per_node > 1 else None)
    return NodeGroups(Mesh(count, node, count, inter[place]), inside)


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
