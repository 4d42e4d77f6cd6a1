"""The commands of the launchers: their arguments, the workers' environment, and the free port."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.config import Config, load_config
from dist_moe.launch.command import LaunchError, threads_per_worker, worker_environment
from dist_moe.launch.launchers.deepspeed import deepspeed_command
from dist_moe.launch.launchers.torchrun import torchrun_command

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"


@pytest.fixture
def config() -> Config:
    return load_config(CONFIG, ["run.threads=3"])


def test_both_launchers_start_the_same_worker(config: Config) -> None:
    for make in (deepspeed_command, torchrun_command):
        command = make(config, 4, "a.yaml", ["train.steps=5", "run.dir=my runs/x"])
        end = ("dist_moe", "train", "a.yaml", "train.steps=5", "run.dir=my runs/x")
        assert command.argv[0] == sys.executable
        assert command.argv[-6:] == ("--module", *end)
        assert "4" in command.argv
        assert command.environment["OMP_NUM_THREADS"] == "3"


def test_nothing_is_restarted_and_the_rendezvous_is_fixed(config: Config) -> None:
    argv = torchrun_command(config, 2, "a.yaml").argv
    assert argv[argv.index("--max-restarts") + 1] == "0"
    assert argv[argv.index("--master-addr") + 1] == "127.0.0.1"
    assert "--standalone" not in argv


def test_another_jobs_hosts_are_not_used(config: Config) -> None:
    argv = deepspeed_command(config, 2, "a.yaml").argv
    assert argv[argv.index("--hostfile") + 1] == os.devnull


def test_the_users_devices_survive_the_deepspeed_launcher(config: Config) -> None:
    base = {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert deepspeed_command(config, 2, "a", base=base).environment["DIST_MOE_VISIBLE_DEVICES"] == "2,3"
    assert "DIST_MOE_VISIBLE_DEVICES" not in deepspeed_command(config, 2, "a", base={}).environment


def test_a_missing_deepspeed_is_an_error_with_a_remedy(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError, match="use --launcher torchrun"):
        deepspeed_command(config, 2, "a.yaml")


def test_an_outer_job_does_not_reach_the_workers(config: Config) -> None:
    outer = {"RANK": "3", "WORLD_SIZE": "9", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "HOME": "/h"}
    environment = worker_environment(config, 2, {**outer, "PATH": "/bin", "GLOO_SOCKET_IFNAME": "eth7"})
    assert environment == {
        "HOME": "/h",
        "GLOO_SOCKET_IFNAME": "eth7",
        "OMP_NUM_THREADS": "3",
        "PYTHONSAFEPATH": "1",
        "PATH": f"{Path(sys.executable).parent}:/bin",
    }
    assert worker_environment(config, 2, {})["GLOO_SOCKET_IFNAME"] == "lo"


def test_threads_are_shared_out_and_never_none() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_worker("auto", 1) == cores
    assert threads_per_worker("auto", 10 * cores) == 1
    assert threads_per_worker(7, 100) == 7


def test_the_printed_line_runs_in_a_shell_as_the_command_would(config: Config) -> None:
    base = {"PATH": os.environ["PATH"], "RANK": "3"}
    command = torchrun_command(config, 2, "a.yaml", ["run.dir=my runs/$x"], base=base)
    probe = "import os, sys; print(sys.argv[1:], sorted(os.environ.items()))"
    program = " ".join([sys.executable, *command.argv[1:3]])
    line = command.lines(base)[0].replace(program, f"{sys.executable} -c '{probe}'", 1)
    done = subprocess.run(["/bin/sh", "-c", line], env=base, capture_output=True, text=True, check=True)
    expected = [item for item in sorted(command.environment.items())]
    assert str(list(command.argv[3:])) in done.stdout
    assert all(str(item) in done.stdout for item in expected)
    assert "'RANK'" not in done.stdout
