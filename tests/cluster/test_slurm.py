"""A real Slurm with a controller and two nodes: jobs train, are requeued before their time limit, and resume."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import DIST_MOE, ROOT, logged, write_config
from tests.cluster.hosts import Ended, Host
from tests.cluster.slurm import Slurm, slurm
from tests.cluster.test_launchers import alone, assert_close_losses, losses  # noqa: F401  (a fixture)

LIMIT_S = 200.0


@pytest.fixture(scope="module")
def controlled(three: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(three[:2], tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submitted(controlled: Slurm, folder: Path, *overrides: str) -> str:
    """Submit a run by `dist-moe launch`; return the number of its job."""
    options = ["--launcher", "slurm", "slurm.nodes=2", *overrides]
    return number_of(controlled.run([str(DIST_MOE), "launch", "run.yaml", *options], folder))


def number_of(ended: Ended) -> str:
    assert ended.code == 0, ended.errors
    line = ended.output.splitlines()[-1]
    assert line.startswith("Submitted batch job "), ended.output
    return line.split()[-1]


def until(controlled: Slurm, number: str, **wanted: str) -> dict[str, str]:
    deadline = time.monotonic() + LIMIT_S
    while True:
        job = controlled.job(number)
        if all(job.get(name) == value for name, value in wanted.items()):
            return job
        assert time.monotonic() < deadline and job.get("JobState") != "FAILED", repr(job)
        time.sleep(1)


def test_a_job_over_two_nodes_trains_as_on_one_host(
    controlled: Slurm,
    alone: list[float],  # noqa: F811
    tmp_path: Path,
) -> None:
    write_config(tmp_path, [], (), 4)
    number = submitted(controlled, tmp_path)
    until(controlled, number, JobState="COMPLETED")
    found = losses(tmp_path / "run")
    assert_close_losses(found, alone)
    log = (tmp_path / "run" / "logs" / f"slurm-{number}.log").read_text()
    assert "0: deepseek_v3: 0.2 M parameters" in log and "2 workers, expert parallel 2" in log
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world"]["launcher"] == "slurm"


def test_the_script_in_launch_trains_as_it_is(
    controlled: Slurm,
    alone: list[float],  # noqa: F811
    tmp_path: Path,
) -> None:
    write_config(tmp_path, [], (), 4)
    script = ROOT / "launch" / "slurm" / "job.sbatch"
    # Options of sbatch precede those in the script.
    variables = f"--export=PATH,HOME,CONFIG=run.yaml,PYTHON={sys.executable}"
    ended = controlled.run(["sbatch", "--nodes=2", variables, str(script), "observe.tensorboard=false"], tmp_path)
    until(controlled, number_of(ended), JobState="COMPLETED")
    assert_close_losses(losses(tmp_path / "run"), alone)


def test_deepspeeds_slurm_runner_trains_as_on_one_host(
    controlled: Slurm,
    three: list[Host],
    alone: list[float],  # noqa: F811
    tmp_path: Path,
) -> None:
    write_config(tmp_path, three, (1, 1), 4)
    options = ["--launcher", "deepspeed", "--runner", "slurm"]
    ended = controlled.run([str(DIST_MOE), "launch", "run.yaml", *options], tmp_path, LIMIT_S)
    assert ended.code == 0, ended.output + ended.errors
    found = losses(tmp_path / "run")
    assert_close_losses(found, alone)
    assert (tmp_path / "run" / "logs" / "rank-1.log").is_file()


def test_a_job_is_requeued_before_its_time_limit_and_resumes(controlled: Slurm, tmp_path: Path) -> None:
    """The only checkpoint is that of the signal; the next part of the same job begins after its step."""
    write_config(tmp_path, [], (), 100_000)
    # Slurm checks once a minute, so the signal may come up to a minute early.
    changes = ("slurm.minutes=2", "slurm.signal_s=20", "observe.interval=1")
    number = submitted(controlled, tmp_path, *changes)
    until(controlled, number, JobState="RUNNING", Restarts="0")
    until(controlled, number, JobState="PENDING", Restarts="1")
    run = tmp_path / "run"
    stopped = logged(run)[-1]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped:06d}\n"
    # Slurm starts a requeued job after two minutes. Its nodes need a few seconds.
    controlled.run(["scontrol", "update", f"JobId={number}", "StartTime=now+10"], tmp_path)
    until(controlled, number, JobState="RUNNING", Restarts="1")
    deadline = time.monotonic() + LIMIT_S
    while logged(run)[-1] < stopped + 3:
        assert time.monotonic() < deadline, "the second part does not train"
        time.sleep(0.5)
    controlled.run(["scancel", number], tmp_path)
    until(controlled, number, JobState="CANCELLED")
    steps = logged(run)
    assert steps == list(range(1, len(steps) + 1)), "no step is missing or repeated"
    log = (run / "logs" / f"slurm-{number}.log").read_text()
    assert f"0: stopped on request after step {stopped}" in log
    assert f"0: resuming after step {stopped} from " in log
