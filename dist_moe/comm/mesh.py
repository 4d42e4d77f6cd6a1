"""The mesh: which ranks hold which experts, as one frozen value that is passed by argument."""

from dataclasses import dataclass

import torch.distributed as dist


class MeshError(ValueError):
    """A mesh that cannot be laid out (value, rule and remedy in the message)."""


@dataclass(frozen=True)
class Mesh:
    """Ranks laid out as expert_data_parallel x expert_parallel, the expert-parallel axis innermost.

    Rank r sits at (r // expert_parallel, r % expert_parallel). The ranks of one row exchange tokens and hold
    different experts; the ranks of one column hold the same experts (DeepSpeed orders its groups the same way).
    `ep_group` is the process group of this rank's row, None where expert_parallel is 1.
    """

    world_size: int
    rank: int
    expert_parallel: int
    ep_group: dist.ProcessGroup | None = None

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


def make_mesh(expert_parallel: int) -> Mesh:
    """Lay the joined world out and create every row's process group (a collective call: all ranks make it)."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mesh = Mesh(world_size, rank, expert_parallel)
    if expert_parallel == 1:
        return mesh
    groups = [
        dist.new_group(list(range(start, start + expert_parallel))) for start in range(0, world_size, expert_parallel)
    ]
    return Mesh(world_size, rank, expert_parallel, groups[mesh.edp_rank])


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
