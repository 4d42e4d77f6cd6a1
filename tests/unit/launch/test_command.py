"""What all commands share: the workers' environment and the printed line; and the launchers on one host."""

import base64
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.config import Config, load_config
from dist_moe.launch.command import Command, LaunchError, threads_per_worker, worker_environment
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher, load_launcher
from dist_moe.worker.launcher_variables import LAUNCHERS
from dist_moe.worker.rank_info import rank_info_from_env
from tests.unit.worker import launcher_environments as env

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
CONFIG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"


@pytest.fixture
def config() -> Config:
    return load_config(CONFIG, ["run.threads=3"])


def command_of(
    launcher: str, config: Config, *overrides: str, workers: int = 2, base: dict[str, str] | None = None
) -> Command:
    loaded = load_launcher(launcher)
    assert isinstance(loaded, ProcessLauncher)
    request = LaunchRequest(config, "a.yaml", overrides, asked_workers=workers)
    return loaded.command(request, dict(os.environ) if base is None else base)


def devices_of(command: Command) -> dict[str, list[int]]:
    """The hosts and their devices as DeepSpeed's launcher is given them."""
    encoded = next(word for word in command.argv if word.startswith("--world_info=")).partition("=")[2]
    devices: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(encoded))
    return devices


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_launchers_start_the_same_worker(launcher: str, config: Config) -> None:
    command = command_of(launcher, config, "train.steps=5", "run.dir=my runs/x", workers=4)
    end = ("dist_moe", "train", "a.yaml", "train.steps=5", "run.dir=my runs/x")
    assert command.argv[0] == sys.executable
    assert command.argv[-6:] == ("--module", *end)
    assert "4" in command.argv or devices_of(command) == {"localhost": [0, 1, 2, 3]}
    assert command.environment["OMP_NUM_THREADS"] == "3"


def test_torchrun_restarts_nothing_by_default_and_meets_at_a_private_file(config: Config) -> None:
    command = command_of("torchrun", config)
    argv = command.argv
    assert argv[argv.index("--max-restarts") + 1] == "0"
    assert argv[argv.index("--rdzv-conf") + 1] == "store_type=file"
    path = Path(argv[argv.index("--rdzv-endpoint") + 1])
    assert not path.parent.exists(), "nothing is written before the job runs"
    with command.written():
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert not path.parent.exists()


def test_deepspeed_starts_workers_of_this_host_whatever_its_hostfile_says(config: Config) -> None:
    command = command_of("deepspeed", config)
    assert command.argv[1:3] == ("-m", "dist_moe.launch.deepspeed_host")
    assert devices_of(command) == {"localhost": [0, 1]}


def test_deepspeed_keeps_the_users_devices(config: Config) -> None:
    kept = command_of("deepspeed", config, base={"CUDA_VISIBLE_DEVICES": "2,3"}).environment
    assert kept["DIST_MOE_VISIBLE_DEVICES"] == "2,3"
    assert "DIST_MOE_VISIBLE_DEVICES" not in command_of("deepspeed", config, base={}).environment


def test_deepspeed_not_installed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"finds no module deepspeed, .* use --launcher torchrun"):
        command_of("deepspeed", config)


def test_worker_environment_without_the_variables_of_an_outer_job(config: Config) -> None:
    outer = {"RANK": "3", "WORLD_SIZE": "9", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "HOME": "/h"}
    environment = worker_environment(config, 2, {**outer, "PATH": "/bin", "GLOO_SOCKET_IFNAME": "eth7"})
    assert environment == {
        "HOME": "/h",
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "3",
        "PYTHONSAFEPATH": "1",
        "PATH": f"{Path(sys.executable).parent}:/bin",
    }
    assert worker_environment(config, 2, {})["GLOO_SOCKET_IFNAME"] == "lo"
    assert worker_environment(config, 2, {"NCCL_SOCKET_IFNAME": "ib0"})["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("launcher", "outer"),
    [
        ("mpirun", env.OPENMPI | {"OMPI_MCA_ess_base_jobid": "1323499521", "OMPI_MCA_orte_ess_num_procs": "2"}),
        ("deepspeed", env.TORCHRUN),
        *(
            ("torchrun", outer)
            for outer in (env.DEEPSPEED, env.MPICH, env.MVAPICH, env.JSRUN, env.PALS, env.PYTORCHJOB_PET, env.SRUN_PMI2)
        ),
    ],
)
def test_workers_of_a_launch_within_another_job_are_of_the_new_one(
    launcher: str, outer: dict[str, str], config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"OMPI_MCA_mpi_yield_when_idle": "1", "PMIX_MCA_mca_base_component_show_load_errors": "0"}
    with caplog.at_level(logging.INFO, logger="dist_moe.launch.outer_job"):
        found = command_of(launcher, config, base={**os.environ, **settings, **outer}).environment
    assert rank_info_from_env({k: v for k, v in found.items() if k not in RENDEZVOUS}).launcher == "none"
    assert not [name for name in found if name.startswith(("PET_", "PMI_", "TORCHELASTIC_", "CROSS_", "SLURM_STEP"))]
    assert settings.items() <= found.items(), "the user's settings of OpenMPI"
    rank = next(names.rank for names in LAUNCHERS if names.rank in outer)
    assert any(rank in record.message and "of another job" in record.message for record in caplog.records)


def test_mpirun_reads_no_allocation_and_its_workers_know_their_job(config: Config) -> None:
    allocation = env.BATCH | {"SLURM_JOBID": "3", "SLURM_RESTART_COUNT": "1"}
    pbs_and_lsf = {"PBS_JOBID": "1", "PBS_NODEFILE": "/nodes", "LSB_MCPU_HOSTS": "na 2", "LSB_JOBID": "7"}
    base = {**os.environ, **allocation, **pbs_and_lsf}
    kept = command_of("mpirun", config, base=base).environment
    left = {name: value for name, value in kept.items() if name.startswith(("SLURM", "PBS", "LSB"))}
    assert left == {"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "1"}
    assert command_of("torchrun", config, base=base).environment["SLURM_JOBID"] == "3", "torchrun reads none of them"


def test_threads_per_worker_divides_the_cores_and_is_never_zero() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_worker("auto", 1) == cores
    assert threads_per_worker("auto", 10 * cores) == 1
    assert threads_per_worker(7, 100) == 7


def test_printed_line_runs_in_a_shell_as_the_command_would(config: Config) -> None:
    base = {"PATH": os.environ["PATH"], "RANK": "3"}
    command = command_of("torchrun", config, "run.dir=my runs/$x", base=base)
    probe = "import os, sys; print(sys.argv[1:], sorted(os.environ.items()))"
    program = " ".join([sys.executable, *command.argv[1:3]])
    line = command.lines(base)[0].replace(program, f"{sys.executable} -c '{probe}'", 1)
    done = subprocess.run(["/bin/sh", "-c", line], env=base, capture_output=True, text=True, check=True)
    assert str(list(command.argv[3:])) in done.stdout
    assert all(str(item) in done.stdout for item in sorted(command.environment.items()))
    assert "'RANK'" not in done.stdout


def test_a_printed_command_has_one_option_a_line_and_only_variables_that_differ() -> None:
    base = {"PATH": "/usr/bin:/bin", "A": "1", "GONE": "x", "SAME": "y"}
    environment = {"PATH": "/venv/bin:/usr/bin:/bin", "A": "two words", "SAME": "y"}
    argv = ("python", "-m", "run", "--hostfile", "/dev/null", "-x", "A", "train", "a.yaml", "data.sources=[a, b]")
    remote = ("ssh", "-p", "22", "node1", "cd /x && python")
    assert Command("torchrun", argv, environment, (remote,)).lines(base) == [
        " \\\n    ".join(
            [
                *("env", "-u GONE", "A='two words'", 'PATH=/venv/bin:"$PATH"', "python -m run"),
                *("--hostfile /dev/null", "-x A train a.yaml 'data.sources=[a, b]'"),
            ]
        ),
        "ssh \\\n    -p 22 node1 'cd /x && python'",
    ]
    assert Command("torchrun", ("true",), base).lines(base) == ["true"]
