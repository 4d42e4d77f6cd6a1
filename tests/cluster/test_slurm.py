"""A real controller and two nodes: the script that we write trains, is told before its limit, is queued again, and goes
on from where it was."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import DIST_MOE, logged, write_config
from tests.cluster.hosts import Host
from tests.cluster.slurm import Slurm, slurm
from tests.cluster.test_launchers import alone, assert_alike, losses  # noqa: F401  (a fixture)

LIMIT_S = 200.0


@pytest.fixture(scope="module")
def controlled(three: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(three[:2], tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submitted(controlled: Slurm, folder: Path, *overrides: str) -> str:
    """Hand a run to Slurm by `dist-moe launch` -> the number of its job."""
    options = ["--launcher", "slurm", "slurm.nodes=2", *overrides]
    ended = controlled.run([str(DIST_MOE), "launch", "run.yaml", *options], folder)
    assert ended.code == 0 and ended.output.startswith("Submitted batch job "), ended.errors
    return ended.output.split()[-1]


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
    assert_alike(found, alone)
    log = (tmp_path / "run" / "logs" / f"slurm-{number}.log").read_text()
    assert "0: deepseek_v3: 0.2 M parameters" in log and "2 workers, expert parallel 2" in log
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world"]["launcher"] == "slurm"


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
    assert_alike(found, alone)
    assert (tmp_path / "run" / "logs" / "rank-1.log").is_file()


def test_a_job_is_told_before_its_limit_queued_again_and_goes_on(controlled: Slurm, tmp_path: Path) -> None:
    """The signal makes the one checkpoint that there is; the next part of the same job begins after its step."""
    write_config(tmp_path, [], (), 100_000)
    # Slurm looks once a minute, so that the signal may come up to a minute before it is due.
    changes = ("slurm.minutes=2", "slurm.signal_s=20", "observe.interval=1")
    number = submitted(controlled, tmp_path, *changes)
    until(controlled, number, JobState="RUNNING", Restarts="0")
    until(controlled, number, JobState="PENDING", Restarts="1")
    run = tmp_path / "run"
    stopped = logged(run)[-1]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped:06d}\n"
    # Slurm lets two minutes pass before a job that was queued again begins. Its nodes need a few seconds.
    controlled.run(["scontrol", "update", f"JobId={number}", "StartTime=now+10"], tmp_path)
    until(controlled, number, JobState="RUNNING", Restarts="1")
    deadline = time.monotonic() + LIMIT_S
    while logged(run)[-1] < stopped + 3:
        assert time.monotonic() < deadline, "the second part does not train"
        time.sleep(0.5)
    controlled.run(["scancel", number], tmp_path)
    until(controlled, number, JobState="CANCELLED")
    steps = logged(run)
    assert steps == list(range(1, len(steps) + 1)), "no step is missing or made twice"
    log = (run / "logs" / f"slurm-{number}.log").read_text()
    assert f"0: stopped on request after step {stopped}" in log
    assert f"0: resuming after step {stopped} from " in log
