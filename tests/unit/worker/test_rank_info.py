"""The rank of a worker, read from the environment of each launcher, and of one inside another."""

from collections.abc import Mapping

import pytest

from dist_moe.worker.launcher_variables import tasks_of_nodes
from dist_moe.worker.rank_info import RankInfo, RankInfoError, rank_info_from_env
from tests.unit.worker import launcher_environments as env

ON_SECOND_HOST = (2, 3, 0, 1)


def without(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param(env.TORCHRUN, (*ON_SECOND_HOST, "env"), id="torchrun"),
        pytest.param(env.TORCHRUN_ONE_HOST, (1, 2, 1, 2, "env"), id="torchrun on one host"),
        pytest.param(env.DEEPSPEED, (*ON_SECOND_HOST, "env"), id="deepspeed"),
        pytest.param(env.OPENMPI, (*ON_SECOND_HOST, "openmpi"), id="OpenMPI"),
        pytest.param(env.MPICH, (*ON_SECOND_HOST, "mpich"), id="MPICH"),
        pytest.param(env.MVAPICH, (*ON_SECOND_HOST, "mvapich"), id="MVAPICH"),
        pytest.param(env.JSRUN, (*ON_SECOND_HOST, "jsrun"), id="jsrun"),
        pytest.param(env.PALS, (*ON_SECOND_HOST, "pals"), id="PALS"),
        pytest.param(env.FLUX, (3, 4, 1, 2, "flux"), id="Flux"),
        pytest.param(env.SRUN, (*ON_SECOND_HOST, "slurm"), id="srun --mpi=none"),
        pytest.param(env.SRUN_PMI2, (*ON_SECOND_HOST, "slurm"), id="srun --mpi=pmi2"),
        pytest.param(env.SRUN_PMIX, (*ON_SECOND_HOST, "slurm"), id="srun --mpi=pmix"),
        pytest.param(
            env.SRUN | {"SLURM_NTASKS": "8", "SLURM_NPROCS": "8"},
            (*ON_SECOND_HOST, "slurm"),
            id="srun of a part of the job's tasks",
        ),
        pytest.param(
            {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"},
            (*ON_SECOND_HOST, "slurm"),
            id="srun, in a container that is given three variables",
        ),
        pytest.param(env.MPICH_IN_SLURM, (*ON_SECOND_HOST, "mpich"), id="MPICH in a batch script"),
        pytest.param(env.BATCH | env.MPICH, (*ON_SECOND_HOST, "mpich"), id="MPICH with -launcher fork"),
        pytest.param(env.OPENMPI_IN_SLURM, (*ON_SECOND_HOST, "openmpi"), id="OpenMPI in a batch script"),
        pytest.param(env.BATCH | env.TORCHRUN_ONE_HOST, (1, 2, 1, 2, "env"), id="torchrun in a batch script"),
        pytest.param(env.BATCH | env.DEEPSPEED, (*ON_SECOND_HOST, "env"), id="deepspeed in a batch script"),
        pytest.param(
            env.SRUN
            | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
            | env.TORCHRUN,
            (*ON_SECOND_HOST, "env"),
            id="srun of one torchrun on each node",
        ),
        pytest.param(
            env.SRUN
            | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
            | env.TORCHRUN_ONE_HOST,
            (1, 2, 1, 2, "env"),
            id="srun --ntasks=1 torchrun",
        ),
        pytest.param(
            env.SRUN | {"RANK": "2", "WORLD_SIZE": "3"}, (*ON_SECOND_HOST, "env"), id="srun, RANK exported by hand"
        ),
        pytest.param(
            env.OPENMPI | {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"},
            (*ON_SECOND_HOST, "env"),
            id="OpenMPI, RANK and LOCAL_RANK exported by hand",
        ),
        pytest.param(
            without(env.PALS, "PMI_SIZE", "PMI_RANK") | {"RANK": "2", "WORLD_SIZE": "3"},
            (*ON_SECOND_HOST, "env"),
            id="PALS without a size, RANK exported by hand",
        ),
        pytest.param(env.PYTORCHJOB, (*ON_SECOND_HOST, "env"), id="PyTorchJob"),
        pytest.param(env.PYTORCHJOB_PET, (*ON_SECOND_HOST, "env"), id="PyTorchJob with PET_*"),
        pytest.param(env.TRAINJOB | env.TORCHRUN, (*ON_SECOND_HOST, "env"), id="TrainJob with torchrun"),
        pytest.param(env.JOBSET | env.PYTORCHJOB, (*ON_SECOND_HOST, "env"), id="JobSet with RANK"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1, 2, "env"), id="by hand, on one host"
        ),
    ],
)
def test_the_rank_is_read_from_each_launchers_variables(
    environment: dict[str, str], expected: tuple[int, int, int, int, str]
) -> None:
    found = rank_info_from_env(environment)
    assert (found, found.notes) == (RankInfo(*expected), ())


@pytest.mark.parametrize("environment", [{}, env.BATCH_ONE, {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}])
def test_without_a_launcher_it_is_rank_0_of_1(environment: dict[str, str]) -> None:
    found = rank_info_from_env(environment)
    assert (found, found.notes) == (RankInfo(0, 1, 0, 1, "none"), ())


@pytest.mark.parametrize(
    ("environment", "expected", "note"),
    [
        ({"RANK": "0"}, RankInfo(), "RANK=0 is ignored, since WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "1"}, RankInfo(), "WORLD_SIZE=1 is ignored, since RANK is not set"),
        ({"LOCAL_RANK": "2"}, RankInfo(), "LOCAL_RANK=2 is ignored, since RANK and WORLD_SIZE are not set"),
        (env.SALLOC, RankInfo(), "SLURM_NTASKS=3 is ignored, since a shell and not srun started this process"),
        (env.SALLOC_STEP, RankInfo(), "SLURM_NTASKS=3 is ignored, since a shell and not srun started this process"),
        ({"JOB_COMPLETION_INDEX": "0"}, RankInfo(), "JOB_COMPLETION_INDEX=0 without RANK and WORLD_SIZE: this pod"),
        (
            env.SRUN | {"WORLD_SIZE": "8"},
            RankInfo(*ON_SECOND_HOST, "slurm"),
            "WORLD_SIZE=8 is ignored, since slurm started this worker as SLURM_PROCID=2 of SLURM_STEP_NUM_TASKS=3",
        ),
        (
            env.SRUN | {"PMI_RANK": "0", "PMI_SIZE": "2"},
            RankInfo(*ON_SECOND_HOST, "slurm"),
            "PMI_RANK=0 of PMI_SIZE=2 is ignored, since srun started this process as SLURM_PROCID=2",
        ),
    ],
)
def test_what_is_ignored_is_noted(environment: dict[str, str], expected: RankInfo, note: str) -> None:
    found = rank_info_from_env(environment)
    assert found == expected
    assert len(found.notes) == 1 and note in found.notes[0]


@pytest.mark.parametrize("environment", [env.MPICH_IN_SLURM, env.OPENMPI_IN_SLURM, env.SRUN_PMI2, env.PALS])
def test_a_worker_that_exports_its_own_rank_keeps_it(environment: dict[str, str]) -> None:
    own = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert rank_info_from_env(environment | own) == RankInfo(*ON_SECOND_HOST, "env")


def test_a_shell_that_srun_made_is_no_job_of_its_own() -> None:
    shell = {"PMI_RANK": "0", "PMI_SIZE": "1"}
    assert rank_info_from_env(env.SRUN | shell) == RankInfo(*ON_SECOND_HOST, "slurm")
    alone = env.SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert rank_info_from_env(alone | env.OPENMPI) == RankInfo(*ON_SECOND_HOST, "openmpi")


@pytest.mark.parametrize("environment", [env.BATCH, env.BATCH | {"SLURM_STEP_ID": "4294967291"}, env.BATCH_NODES])
def test_a_batch_script_that_starts_one_worker_of_several_without_srun(environment: dict[str, str]) -> None:
    name = "SLURM_NTASKS=3" if "SLURM_NTASKS" in environment else "SLURM_TASKS_PER_NODE=1(x2)"
    with pytest.raises(RankInfoError) as error:
        rank_info_from_env(environment)
    assert f"{name} in the batch script of Slurm job 3, and srun has not started this process" in str(error.value)
    assert "write `srun python -m dist_moe train CONFIG`" in str(error.value)
    assert "or `dist-moe launch CONFIG --workers N`" in str(error.value)
    found = rank_info_from_env(environment, alone_in_batch=True)
    assert found == RankInfo()
    assert found.notes == (
        f"{name} is ignored, since the batch script and not srun started this process: it is one worker alone",
    )


@pytest.mark.parametrize(
    ("environment", "messages"),
    [
        (env.TORCHRUN | {"RANK": "two"}, ["RANK='two' is not an integer >= 0; start the worker with a launcher"]),
        (env.TORCHRUN | {"WORLD_SIZE": "-1"}, ["WORLD_SIZE='-1' is not an integer >= 0"]),
        (env.TORCHRUN | {"RANK": "²", "LOCAL_RANK": "x"}, ["RANK='²' is not an", "LOCAL_RANK='x' is not an integer"]),
        (env.TORCHRUN | {"RANK": "3"}, ["RANK=3 must be below WORLD_SIZE=3; unset both"]),
        (env.TORCHRUN | {"LOCAL_RANK": "1"}, ["LOCAL_RANK=1 must be below LOCAL_WORLD_SIZE=1"]),
        (env.TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, ["LOCAL_WORLD_SIZE=4 must not be above WORLD_SIZE=3"]),
        (env.TORCHRUN_ONE_HOST | {"RANK": "0"}, ["LOCAL_RANK=1 must not be above RANK=0"]),
        ({"RANK": "3"}, ["RANK=3 comes without WORLD_SIZE; set both"]),
        ({"WORLD_SIZE": "3"}, ["WORLD_SIZE=3 comes without RANK; start the workers with a launcher, or unset"]),
        (
            {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"},
            ["LOCAL_RANK=0 of RANK=2 of WORLD_SIZE=3 comes without LOCAL_WORLD_SIZE"],
        ),
        ({"OMPI_COMM_WORLD_RANK": "1"}, ["OMPI_COMM_WORLD_RANK=1 comes without OMPI_COMM_WORLD_SIZE"]),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2"},
            ["PMI_RANK=1 of PMI_SIZE=2 comes without PMI_LOCAL_RANK, so that all workers of a host would use"],
        ),
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "x"}, ["PMIX_RANK=1 comes without a number of workers"]),
        (
            without(env.SRUN | {"SLURM_NODEID": "0", "SLURM_PROCID": "1"}, "SLURM_LOCALID"),
            ["SLURM_PROCID=1 of SLURM_STEP_NUM_TASKS=3 comes without SLURM_LOCALID"],
        ),
        (
            env.PYTORCHJOB_PET | {"PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "12"},
            ["RANK=2 of WORLD_SIZE=12 comes with PET_NPROC_PER_NODE=4, so it is the rank of a pod", "by torchrun"],
        ),
        (env.TRAINJOB, ["PET_NNODES=3 asks for several workers, and none of them has a RANK", "by torchrun"]),
        ({"PET_NNODES": "1:4"}, ["PET_NNODES=1:4 asks for several workers"]),
        (env.JOBSET, ["JOB_COMPLETION_INDEX=2 is the number of a pod", "--node-rank $JOB_COMPLETION_INDEX"]),
        # A torchrun job's variables are left in the shell that runs srun or mpirun.
        (
            env.SRUN | env.TORCHRUN_ONE_HOST,
            ["RANK=1 of WORLD_SIZE=2 contradicts SLURM_PROCID=2 of SLURM_STEP_NUM_TASKS=3", "unset RANK, WORLD_SIZE"],
        ),
        (env.SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, ["RANK=0 of WORLD_SIZE=1 contradicts SLURM_PROCID=2"]),
        (env.OPENMPI | {"RANK": "0", "WORLD_SIZE": "3"}, ["RANK=0 of WORLD_SIZE=3 contradicts OMPI_COMM_WORLD_RANK=2"]),
        (
            env.OPENMPI | env.MPICH | {"PMI_RANK": "0"},
            ["OMPI_COMM_WORLD_RANK=2 of OMPI_COMM_WORLD_SIZE=3 contradicts PMI_RANK=0", "unset PMI_RANK and PMI_SIZE"],
        ),
    ],
)
def test_a_rank_that_cannot_be_is_an_error(environment: dict[str, str], messages: list[str]) -> None:
    with pytest.raises(RankInfoError) as error:
        rank_info_from_env(environment)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1(x2)", [1, 1]), ("2,1,3(x2)", [2, 1, 3, 3]), ("", []), ("2(3)", [])],
)
def test_tasks_of_nodes_reads_slurms_notation(text: str, tasks: list[int]) -> None:
    assert tasks_of_nodes(text) == tasks
