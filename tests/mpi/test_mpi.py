"""The MPI backend in real jobs of mpirun: every collective, its errors, and a training run compared with gloo."""

import json
from pathlib import Path

import pytest

from dist_moe.worker.network import free_port
from tests.mpi.mpirun import ROOT, mpirun
from tests.selection import full, slow


@pytest.mark.parametrize("ranks", [2, full(3), slow(4)])
def test_every_collective_equals_gloos(ranks: int) -> None:
    job = mpirun(ranks, ["-m", "tests.mpi.collectives", str(free_port())])
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count(" agreed") == ranks, job.stdout


def test_trap_T16_a_group_of_one_rank_reduces_nothing() -> None:
    job = mpirun(1, ["-m", "tests.mpi.alone", str(free_port())])
    assert job.returncode == 0 and "[2.0, 3.0]" in job.stdout, job.stdout + job.stderr


@pytest.mark.slow
def test_what_gloo_lacks_and_errors() -> None:
    job = mpirun(3, ["-m", "tests.mpi.odds", str(free_port())])
    assert job.stdout.count("passed") == 3, job.stdout + job.stderr


def steps(run_dir: Path) -> list[dict[str, object]]:
    """The records of the steps in a run's metrics."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


@pytest.mark.slow
def test_plain_mpirun_trains_without_an_exported_address(tmp_path: Path) -> None:
    """`auto` is the MPI backend under mpirun. The losses equal gloo's up to rounding."""
    config = ["-m", "dist_moe", "train", str(ROOT / "configs" / "debug.yaml"), "train.steps=6", "observe.interval=1"]
    for backend in ("auto", "gloo"):
        job = mpirun(2, [*config, f"parallel.backend={backend}", f"run.dir={tmp_path / backend}"], PYTHONSAFEPATH="1")
        assert job.returncode == 0, job.stdout + job.stderr
    described = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert described["world"]["backend"] == "mpi"
    ours, theirs = steps(tmp_path / "auto"), steps(tmp_path / "gloo")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-6)
    assert ours[0]["load"] == theirs[0]["load"]
