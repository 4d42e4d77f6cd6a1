"""The choice of the backend, and the process group of a context."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm.init import (
    _fill_rendezvous,
    affinities_of_host,
    init_distributed,
    set_pg_timeouts,
    set_threads,
    set_threads_by_affinities,
)
from dist_moe.worker.network import free_port
from dist_moe.worker.rank_info import RankInfo, RankInfoError, rank_info_from_env
from tests.dist.pool import RankPool


def alone(rank: int, world_size: int) -> tuple[int, str, dict[str, str], bool, bool]:
    """Join as a single process without a launcher, in a process that has no group."""
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name)
    # Left over by another job.
    os.environ.update(MASTER_ADDR="203.0.113.1", MASTER_PORT="9", TORCHELASTIC_USE_AGENT_STORE="True")
    before = dict(os.environ)
    with init_distributed(rank_info_from_env(os.environ), "gloo", 30) as dist_context:
        dist.all_reduce(torch.ones(1))
        size = dist.get_world_size()
        names = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return size, dist_context.backend, names, dist.is_initialized(), os.environ == before


def test_set_threads_divides_cores_except_for_workers_that_mpirun_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    before = torch.get_num_threads()
    try:
        for given, launcher, expected in ((3, "openmpi", 3), ("auto", "env", 2), ("auto", "openmpi", 4)):
            monkeypatch.setenv("OMP_NUM_THREADS", "4")
            set_threads(given, RankInfo(0, 2, 0, 2, launcher))
            assert torch.get_num_threads() == expected
        monkeypatch.delenv("OMP_NUM_THREADS")
        set_threads("auto", RankInfo(0, 2, 0, 2, "openmpi"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("affinities", "launcher", "expected"),
    [
        ([{0, 1, 2, 3}, {4, 5, 6, 7}], "slurm", 4),
        ([{0, 1, 2, 3}, {0, 1, 2, 3}], "slurm", 2),
        ([{0, 1, 2, 3}, {2, 3, 4, 5}], "slurm", 2),
        ([{0, 1, 2, 3}], "none", 2),
        ([{0, 1, 2, 3}, {4, 5, 6, 7}], "openmpi", 2),
    ],
)
def test_a_worker_with_cores_of_its_own_uses_all_of_them(
    monkeypatch: pytest.MonkeyPatch, affinities: list[set[int]], launcher: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        set_threads_by_affinities(RankInfo(0, 2, 0, 2, launcher), affinities)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def different_cores(rank: int, world_size: int) -> list[set[int]]:
    """The cores of the workers of this host, each of which may use another one."""
    with mock.patch.object(os, "sched_getaffinity", lambda _: {rank, rank + 4}):
        return affinities_of_host()


def test_the_workers_of_a_host_know_the_cores_of_each_other(ranks: RankPool) -> None:
    assert ranks.run(different_cores, 2) == [[{0, 4}, {1, 5}]] * 2


def test_a_single_process_needs_no_launcher_and_its_group_ends_with_the_context(ranks: RankPool) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert ranks.run(alone, 1) == [(1, "gloo", variables, False, True)]


def joined_twice(rank: int, world_size: int) -> tuple[int, bool]:
    """Join where a process group exists already."""
    with init_distributed(rank_info_from_env(os.environ), "gloo", 30) as dist_context:
        total = torch.tensor([dist_context.rank_info.rank])
        dist.all_reduce(total)
    return int(total), dist.is_initialized()


def test_an_existing_group_is_used_and_not_destroyed(ranks: RankPool) -> None:
    assert ranks.run(joined_twice, 2) == [(1, True), (1, True)]


def another_mpi(rank: int, world_size: int) -> str:
    """Join with the variables of mpirun, in a process that mpirun did not start."""
    dist.destroy_process_group()
    os.environ.pop("MASTER_ADDR")
    with pytest.raises(RankInfoError) as error, init_distributed(RankInfo(0, 2, 0, 2, "openmpi"), "gloo", 5):
        pass
    return str(error.value)


def test_another_mpi_than_the_one_that_started_the_workers_is_an_error(ranks: RankPool) -> None:
    (message,) = ranks.run(another_mpi, 1)
    assert "openmpi started 2 workers, but mpi4py finds 1: it uses Open MPI v" in message


def without_rendezvous(rank: int, world_size: int) -> str:
    """Join as one of several workers whose launcher set no address of rank 0."""
    dist.destroy_process_group()
    os.environ.pop("MASTER_ADDR")
    os.environ.pop("MASTER_PORT")
    with pytest.raises(RankInfoError) as error, init_distributed(RankInfo(0, 2, 0, 2, "slurm"), "gloo", 5):
        pass
    return str(error.value)


def test_workers_without_a_rendezvous_get_an_error_with_what_to_export(ranks: RankPool) -> None:
    (message,) = ranks.run(without_rendezvous, 1)
    assert "MASTER_ADDR and MASTER_PORT not set: 2 workers (slurm)" in message
    assert "write `export MASTER_ADDR=$(scontrol show hostnames" in message


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_PORT": ""}, "MASTER_PORT not set: 2 workers (env) need the address of rank 0"),
        ({"MASTER_PORT": " ", "MASTER_ADDR": ""}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not an integer >= 0"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1' is not an integer >= 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port from 1 to 65535; set it to that of rank 0's store"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({"MASTER_PORT": "9" * 5000}, "is no port from 1 to 65535"),
        ({"DIST_MOE_PORT": "65536"}, "DIST_MOE_PORT=65536 is no port"),
        ({"DIST_MOE_PORT": "x"}, "DIST_MOE_PORT='x' is not an integer >= 0"),
        ({"DIST_MOE_PORT": "", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_an_invalid_port_is_an_error_with_its_rule(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankInfoError) as error:
        _fill_rendezvous(RankInfo(0, 2, 0, 2, "env"), None, 0)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("address", "given", "expected"),
    [
        ("127.0.0.1", {}, ("lo", "lo")),
        ("localhost", {}, ("lo", "lo")),
        ("::1", {}, ("lo", "lo")),
        ("127.0.0.1", {"NCCL_SOCKET_IFNAME": "ib0"}, ("lo", "ib0")),
        ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "eth7"}, ("eth7", "lo")),
    ],
)
def test_gloo_and_nccl_of_one_host_use_the_loopback_unless_the_user_says_another(
    monkeypatch: pytest.MonkeyPatch, address: str, given: dict[str, str], expected: tuple[str, str]
) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DIST_MOE_PORT", *names):
        monkeypatch.setenv(name, "")  # so that it is restored after what the function sets
        monkeypatch.delenv(name)
    for name, value in {"MASTER_ADDR": address, "MASTER_PORT": "29500", **given}.items():
        monkeypatch.setenv(name, value)
    _fill_rendezvous(RankInfo(0, 2, 0, 2, "env"), None, 0)
    assert tuple(os.environ[name] for name in names) == expected


def with_debug_level(rank: int, world_size: int, level: str, port: int) -> list[tuple[bool, float]]:
    """Set the time-outs of the default group and of a new one; return whether torch wraps each, and its time-out."""
    dist.destroy_process_group()
    dist.set_debug_level(getattr(dist.DebugLevel, level))
    try:
        os.environ["MASTER_PORT"] = str(port)
        with init_distributed(rank_info_from_env(os.environ), "gloo", 30):
            group = dist.new_group()
            set_pg_timeouts(17)
            dist.all_reduce(torch.ones(1), group=group)
            found = [of._get_backend(torch.device("cpu")) for of in (dist.group.WORLD, group) if of]
            inner = [getattr(each, "wrapped_pg", each) for each in found]
            return [
                (one is not two, two.options._timeout.total_seconds()) for one, two in zip(found, inner, strict=True)
            ]
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


@pytest.mark.parametrize("level", ["OFF", "INFO", "DETAIL"])
def test_time_outs_are_set_at_every_debug_level_of_torch(ranks: RankPool, level: str) -> None:
    assert ranks.run(with_debug_level, 2, level, free_port()) == [[(level == "DETAIL", 17.0)] * 2] * 2
