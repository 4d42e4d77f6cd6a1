"""The comparison of flat and hierarchical exchange: where it cannot run."""

import socket

import pytest

from dist_moe.comm.mesh import MeshError
from dist_moe.study.hops import Size, run
from tests.dist.pool import RankPool


def on_one_host(rank: int, world_size: int) -> str:
    with pytest.raises(MeshError) as error:
        run([Size(2, 1, 8)], 1, None)
    return str(error.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_of_one_host_are_told_to_start_on_several(ranks: RankPool, world_size: int) -> None:
    for message in ranks.run(on_one_host, world_size):
        assert f"its {world_size} ranks are on {socket.gethostname()}" in message
        assert "start it on several hosts, for example by `torchrun --nnodes 2" in message
        assert "auto or flat" not in message
