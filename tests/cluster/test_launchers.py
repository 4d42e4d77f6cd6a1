"""Every launcher over several hosts, on any layout: the losses of one host, and a log for every rank."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Start, write_config
from tests.cluster.hosts import Host
from tests.selection import cross, only_first

LAYOUTS = {"2 hosts x 2": (2, 2), "3 hosts x 1": (1, 1, 1)}
LAUNCHERS = {
    "deepspeed by pdsh": ("--launcher", "deepspeed"),
    "deepspeed by openmpi": ("--launcher", "deepspeed", "--runner", "openmpi"),
    "torchrun": ("--launcher", "torchrun"),
    "mpirun": ("--launcher", "mpirun"),
}
CLOSE = 1e-4
"""Relative tolerance; the order of the sum over workers differs."""


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        line["loss" if line["event"] == "step" else "validation_loss"]
        for line in lines
        if line["event"] != "checkpoint"
    ]


def assert_close_losses(found: list[float], alone: list[float]) -> None:
    """Check that the losses of another layout are those of one process, but for rounding."""
    assert all(math.isclose(loss, other, rel_tol=CLOSE) for loss, other in zip(found, alone, strict=True)), (
        found,
        alone,
    )


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run in one process of one host."""
    folder = tmp_path_factory.mktemp("alone")
    write_config(folder, [], (), 4)
    argv = [sys.executable, "-m", "dist_moe", "train", "run.yaml"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, cwd=folder, env=variables, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return losses(folder / "run")


@cross(("layout", list(LAYOUTS)), ("launcher", list(LAUNCHERS)), strength=1)
def test_the_losses_are_those_of_one_host(
    start: Start, alone: list[float], tmp_path: Path, launcher: str, layout: str
) -> None:
    launch = start(LAYOUTS[layout], *LAUNCHERS[launcher])
    ended = launch.end()
    assert ended.code == 0, ended.output + ended.errors
    found = losses(tmp_path / "run")
    assert len(found) == len(alone) == 5
    assert_close_losses(found, alone)
    workers = sum(LAYOUTS[layout])
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == [
        f"rank-{rank}.log" for rank in range(workers)
    ]
    assert f"[0@node0] deepseek_v3: 0.2 M parameters, 2 MoE layers of 12 experts; {workers} workers" in ended.output
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["world"]["backend"] == ("mpi" if "mpi" in launcher else "gloo")


def test_the_plain_deepspeed_command_trains_over_a_hostfile(
    three: list[Host], alone: list[float], tmp_path: Path
) -> None:
    write_config(tmp_path, [], (), 4)
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    program = str(Path(sys.executable).parent / "deepspeed")
    argv = [program, "--hostfile", "hosts", "--no_local_rank", "--module", "dist_moe", "train", "run.yaml"]
    variables = {"DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}
    ended = three[0].run([sys.executable, *argv], tmp_path, 200, **variables)
    assert ended.code == 0, ended.output + ended.errors
    found = losses(tmp_path / "run")
    assert_close_losses(found, alone)


@pytest.mark.parametrize("launcher", only_first(["torchrun", "deepspeed", "mpirun"]))
def test_the_script_in_launch_trains_on_two_hosts(
    three: list[Host], alone: list[float], tmp_path: Path, launcher: str
) -> None:
    """The file as it is, with the hostfile of these hosts; torchrun's runs on each host."""
    write_config(tmp_path, [], (), 4)
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    variables = {"PYTHON": sys.executable, "CONFIG": "run.yaml", "HOSTFILE": str(tmp_path / "hosts")}
    variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    argv = ["sh", str(ROOT / "launch" / "several_hosts" / f"{launcher}.sh"), "observe.tensorboard=false"]
    where = three[:2] if launcher == "torchrun" else three[:1]
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(host.run, argv, tmp_path, 200, HOST=host.name, **variables) for host in where]
        for ended in [started.result() for started in running]:
            assert ended.code == 0, ended.output + ended.errors
    assert_close_losses(losses(tmp_path / "run"), alone)


@pytest.mark.full
def test_excluded_hosts_run_nothing(start: Start, tmp_path: Path) -> None:
    launch = start((1, 1, 1), "cluster.include=node0@node2", "--launcher", "torchrun")
    ended = launch.end()
    assert ended.code == 0, ended.errors
    assert "2 workers, expert parallel 2" in ended.output
