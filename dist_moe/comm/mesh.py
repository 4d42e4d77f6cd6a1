"""The mesh: which ranks hold which experts, as one frozen value that is passed by argument."""

import itertools
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dist_moe.comm.objects import all_gather_objects
from dist_moe.comm.shared_memory import SharedBuffers, open_shared_buffers
from dist_moe.errors import UserError
from dist_moe.text import counted, divisors

logger = logging.getLogger(__name__)


class MeshError(UserError, ValueError):
    """A mesh that does not fit the workers, the experts or the hosts (value, rule and remedy in the message)."""


@dataclass(frozen=True)
class Mesh:
    """Ranks in a grid of expert_data_parallel x expert_parallel, the expert-parallel axis innermost.

    Rank r is at (r // expert_parallel, r % expert_parallel). The ranks of one row exchange tokens and hold different
    experts; the ranks of one column hold the same experts. DeepSpeed orders its groups the same way.

    Attributes:
        world_size: Number of ranks.
        rank: This rank.
        expert_parallel: Ranks of a row.
        ep_group: The process group of this rank's row; None where expert_parallel is 1.
        buffers: Shared memory of the ranks of that row, if they are on one host.
        node_groups: The groups for a hierarchical exchange (two hops); None for a flat one.

    Raises:
        MeshError: expert_parallel does not divide world_size.
    """

    world_size: int
    rank: int
    expert_parallel: int
    ep_group: dist.ProcessGroup | None = None
    buffers: SharedBuffers | None = None
    node_groups: "NodeGroups | None" = None

    def __post_init__(self) -> None:
        if self.expert_parallel < 1 or self.world_size % self.expert_parallel:
            raise MeshError(
                f"parallel.expert_parallel={self.expert_parallel} does not divide the "
                f"{counted(self.world_size, 'worker')}; use one of {divisors(self.world_size)}"
            )

    @property
    def ep_rank(self) -> int:
        """Index on the expert-parallel axis: which slice of the experts this rank holds."""
        return self.rank % self.expert_parallel

    @property
    def edp_rank(self) -> int:
        """Index on the expert-data-parallel axis: which replica of that slice this rank holds."""
        return self.rank // self.expert_parallel

    def local_experts(self, experts: int) -> range:
        """Return the global ids of the experts that this rank holds.

        Args:
            experts: Number of experts of a layer.

        Raises:
            MeshError: expert_parallel does not divide it.
        """
        if experts % self.expert_parallel:
            fitting = [n for n in divisors(self.world_size) if experts % n == 0]
            raise MeshError(
                f"parallel.expert_parallel={self.expert_parallel} does not divide the model's "
                f"{counted(experts, 'expert')}; use one of {fitting}"
            )
        local = experts // self.expert_parallel
        return range(self.ep_rank * local, (self.ep_rank + 1) * local)


@dataclass(frozen=True)
class NodeGroups:
    """An expert-parallel row of N nodes (hosts) with G ranks each, from the view of one rank.

    Attributes:
        inter: The N ranks with the same index within their node as this one, one per node.
        intra: The G ranks of this node.
    """

    inter: Mesh
    intra: Mesh


def make_mesh(expert_parallel: int, ranks_per_node: int = 0, *, shared_memory: bool = True) -> Mesh:
    """Create the mesh of the current process group, and the process groups of every row; a collective call.

    Args:
        expert_parallel: Ranks of a row.
        ranks_per_node: Consecutive ranks of a row that share a node, for a hierarchical exchange in two hops; 0 for a
            flat exchange.
        shared_memory: Exchange rows through shared memory where all ranks of a row, or of a node, are on one host and
            on its CPU.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mesh = Mesh(world_size, rank, expert_parallel)
    if expert_parallel == 1:
        return mesh
    rows = [range(start, start + expert_parallel) for start in range(0, world_size, expert_parallel)]
    groups = [_new_group(row) for row in rows]
    group, nodes = groups[mesh.edp_rank], None
    if ranks_per_node:
        nodes = [_make_node_groups(row, ranks_per_node, rank, shared_memory) for row in rows][mesh.edp_rank]
    buffers = _open_buffers(group) if shared_memory and nodes is None else None
    return Mesh(world_size, rank, expert_parallel, group, buffers, nodes)


def ranks_per_node(all_to_all: str, expert_parallel: int) -> int:
    """Return the `ranks_per_node` of `make_mesh` for `parallel.all_to_all`; a collective call.

    Args:
        all_to_all: flat, hierarchical or auto.
        expert_parallel: Ranks of a row.

    Raises:
        MeshError: "hierarchical" where rows do not span hosts with the same number of ranks on each.
    """
    if all_to_all == "flat" or expert_parallel == 1:
        return 0
    hosts = hosts_of_ranks()
    block = consecutive_ranks_per_host(hosts, expert_parallel)
    if block == 0 and all_to_all == "hierarchical":
        raise MeshError(
            f"parallel.all_to_all=hierarchical needs every {expert_parallel} consecutive workers to span several "
            f"hosts, with the same number on each, but their hosts are {', '.join(hosts)}; use auto or flat"
        )
    logger.info("parallel.all_to_all=%s: %s", all_to_all, f"two hops, {block} ranks per node" if block else "one hop")
    return block


def hosts_of_ranks() -> list[str]:
    """Return the host name of each rank; a collective call."""
    return all_gather_objects(socket.gethostname(), str)


def consecutive_ranks_per_host(hosts: Sequence[str], expert_parallel: int) -> int:
    """Return how many consecutive ranks each host has in every row, if rows span hosts evenly; 0 otherwise.

    Args:
        hosts: The host name of each rank.
        expert_parallel: Ranks of a row.
    """
    rows = [hosts[start : start + expert_parallel] for start in range(0, len(hosts), expert_parallel)]
    blocks = [[(host, len(list(ranks))) for host, ranks in itertools.groupby(row)] for row in rows]
    sizes = {size for row in blocks for _, size in row}
    hosts_once = all(len({host for host, _ in row}) == len(row) for row in blocks)
    size = sizes.pop()
    return size if not sizes and hosts_once and size < expert_parallel else 0


def _new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Create a group with the time-out of the default group; a collective call of all ranks.

    `set_pg_timeouts` cannot reach the group that TORCH_DISTRIBUTED_DEBUG=DETAIL creates in addition, which would wait
    30 minutes.
    """
    default: Any = dist.group.WORLD
    device = next(iter(getattr(default, "_device_types", [])), None)  # none for the backend over MPI
    backend = default if device is None else default._get_backend(device)
    options = getattr(getattr(backend, "wrapped_pg", backend), "options", None)
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=getattr(options, "_timeout", None))
    return group


def _make_node_groups(row: range, per_node: int, rank: int, shared_memory: bool) -> NodeGroups | None:
    """Create the node groups of a row; None for a rank of another row.

    Every rank creates the groups of all rows in the same order, as `dist.new_group` requires.
    """
    count = len(row) // per_node
    inter = [_new_group(row[index::per_node]) for index in range(per_node)]
    intra = [_new_group(row[node * per_node : (node + 1) * per_node]) for node in range(count)]
    if rank not in row:
        return None
    node, index = divmod(rank - row.start, per_node)
    group = intra[node] if per_node > 1 else None
    buffers = _open_buffers(group) if shared_memory and group is not None else None
    inside = Mesh(per_node, index, per_node, group, buffers)
    return NodeGroups(Mesh(count, node, count, inter[index]), inside)


def _open_buffers(group: dist.ProcessGroup) -> SharedBuffers | None:
    """Return the shared memory of a group; None with NCCL, and where its ranks cannot share memory. Collective."""
    return None if dist.get_backend(group) == "nccl" else open_shared_buffers(group)
