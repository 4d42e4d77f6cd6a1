"""The rank of a worker, read from the environment of each launcher."""

import pytest

from dist_moe.worker.rank_info import RankInfo, RankInfoError, rank_info_from_env

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
OPENMPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in
           {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items()}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [(TORCHRUN, "env"), (DEEPSPEED, "env"), (OPENMPI, "openmpi"), (MPICH, "mpich"), (SLURM, "slurm")],
)
def test_every_launchers_variables_are_read(environment: dict[str, str], launcher: str) -> None:
    assert rank_info_from_env(environment) == RankInfo(5, 8, 1, 4, launcher)


def test_without_a_launcher_it_is_rank_0_of_1() -> None:
    assert rank_info_from_env({}) == RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")
    assert rank_info_from_env({"RANK": "3"}) == RankInfo(), "RANK without WORLD_SIZE"


def test_torchruns_variables_come_before_slurms() -> None:
    assert rank_info_from_env(SLURM | {**TORCHRUN, "RANK": "6"}).rank == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "two"}, "RANK='two' is not an integer >= 0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is not an integer >= 0"),
        ({"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
    ],
)
def test_a_rank_that_cannot_exist_is_an_error(change: dict[str, str], message: str) -> None:
    with pytest.raises(RankInfoError, match=message):
        rank_info_from_env(TORCHRUN | change)
