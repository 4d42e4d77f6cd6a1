"""The mesh: which rank holds which experts, and the process group of each row."""

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm.mesh import Mesh, MeshError, consecutive_ranks_per_host, make_mesh
from tests.dist.pool import RankPool


def test_the_expert_parallel_axis_is_the_inner_one() -> None:
    meshes = [Mesh(world_size=6, rank=rank, expert_parallel=3) for rank in range(6)]
    assert [(mesh.edp_rank, mesh.ep_rank) for mesh in meshes] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [list(mesh.local_experts(6)) for mesh in meshes] == [[0, 1], [2, 3], [4, 5]] * 2


@pytest.mark.parametrize("expert_parallel", [0, 4])
def test_a_mesh_that_does_not_fit_is_an_error_with_the_sizes_that_do(expert_parallel: int) -> None:
    with pytest.raises(MeshError, match=rf"expert_parallel={expert_parallel} .* 6 workers; use .*\[1, 2, 3, 6\]"):
        Mesh(world_size=6, rank=0, expert_parallel=expert_parallel)


def test_experts_that_do_not_divide_are_an_error_with_the_sizes_that_do() -> None:
    with pytest.raises(MeshError, match=r"expert_parallel=4 does not divide the model's 10 experts; use .*\[1, 2\]"):
        Mesh(world_size=4, rank=0, expert_parallel=4).local_experts(10)


def row_of(rank: int, world_size: int, expert_parallel: int) -> list[int]:
    """The ranks of this rank's row, gathered over its group."""
    mesh = make_mesh(expert_parallel)
    if mesh.ep_group is None:
        return []
    answers = [torch.zeros(1, dtype=torch.int64) for _ in range(expert_parallel)]
    dist.all_gather(answers, torch.tensor([rank]), group=mesh.ep_group)
    return [int(answer) for answer in answers]


def test_each_row_of_ranks_has_a_group_of_its_own(ranks: RankPool) -> None:
    assert ranks.run(row_of, 4, 2) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert ranks.run(row_of, 2, 2) == [[0, 1], [0, 1]]
    assert ranks.run(row_of, 2, 1) == [[], []]


@pytest.mark.parametrize(
    ("hosts", "expert_parallel", "block"),
    [
        ("aabb", 4, 2),
        ("abcd", 4, 1),
        ("aabb", 2, 0),  # each row on one host
        ("abab", 4, 0),  # not in blocks
        ("aaab", 4, 0),  # not in equal ones
        ("aabbccdd", 4, 2),
        ("aabbcccc", 4, 0),  # the second row is on one host
        ("abcabc", 3, 1),
    ],
)
def test_consecutive_ranks_per_host_finds_rows_of_equal_blocks(hosts: str, expert_parallel: int, block: int) -> None:
    assert consecutive_ranks_per_host(list(hosts), expert_parallel) == block
