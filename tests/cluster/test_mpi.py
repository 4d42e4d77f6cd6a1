"""OpenMPI and MPICH of Debian, besides the installed wheel: every collective, and launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.worker.network import free_port
from tests.cluster.conftest import ROOT, Start
from tests.cluster.hosts import environment
from tests.cluster.test_launchers import alone, assert_close_losses, losses  # noqa: F401  (a fixture)
from tests.selection import cross

LIBRARIES = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu"
FAMILIES = ("openmpi", "mpich")
LAYOUTS = {"this host": (), "2 hosts x 1": (1, 1)}


def variables_of(family: str, folder: Path) -> dict[str, str]:
    """Return the variables by which mpi4py loads this MPI; Debian names MPICH's library otherwise than its wheel."""
    if family == "openmpi":
        return {"MPI4PY_LIBMPI": str(LIBRARIES / "libmpi.so.40")}
    (folder / "mpich").mkdir()
    (folder / "mpich" / "libmpi.so.12").symlink_to(LIBRARIES / "libmpich.so.12")
    return {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(folder / "mpich")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_collective_gives_what_gloo_gives(tmp_path: Path, family: str) -> None:
    options = ["--oversubscribe", "--allow-run-as-root"] if family == "openmpi" else []
    program = [f"mpirun.{family}", *options, "-n", "2", sys.executable, "-W", "ignore"]
    variables = environment() | {"OMP_NUM_THREADS": "1"} | variables_of(family, tmp_path)
    job = subprocess.run(
        [*program, "-m", "tests.mpi.collectives", str(free_port())],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert job.returncode == 0 and job.stdout.count(" agreed") == 2, job.stdout + job.stderr


@cross(("layout", list(LAYOUTS)), ("family", list(FAMILIES)), strength=1)
def test_the_losses_are_those_of_one_process(
    start: Start,
    alone: list[float],  # noqa: F811
    tmp_path: Path,
    family: str,
    layout: str,
) -> None:
    variables = variables_of(family, tmp_path)
    carried = f"cluster.environment=[{', '.join(variables)}]"
    ended = start(LAYOUTS[layout], "--launcher", "mpirun", carried, **variables).end()
    assert ended.code == 0, ended.output + ended.errors
    found = losses(tmp_path / "run")
    assert_close_losses(found, alone)
    world = json.loads((tmp_path / "run" / "run.json").read_text())["world"]
    assert (world["launcher"], world["backend"], world["workers"]) == (family, "mpi", 2)
    assert "\x1b" not in ended.output, "no control sequences of a terminal in a file"


def test_deepspeeds_mpich_runner_finds_its_mpirun_and_trains(
    start: Start,
    alone: list[float],  # noqa: F811
    tmp_path: Path,
) -> None:
    variables = variables_of("mpich", tmp_path)
    carried = f"cluster.environment=[{', '.join(variables)}]"
    ended = start((1, 1), "--launcher", "deepspeed", "--runner", "mpich", carried, **variables).end()
    assert ended.code == 0, ended.output + ended.errors
    found = losses(tmp_path / "run")
    assert_close_losses(found, alone)
