"""Real workers that are requested to stop: a checkpoint after the step, exit code 75, and the same losses later."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dist_moe.worker.contract import STOPPED_CODE
from dist_moe.worker.network import free_port
from tests.dist.loaded import LoadedProcess
from tests.dist.resumable import command, same_bits, steps, write_text

LIMIT_S = 200.0
STEPS = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [worker.wait(LIMIT_S) for worker in start(text, run)] == [0, 0]
    return run


def start(text: Path, run: Path, *changes: str) -> list[LoadedProcess]:
    """Start two workers by environment variables alone, with two micro-batches a step."""
    argv = command(text, run, f"train.steps={STEPS}", "train.schedule_steps=null", *changes)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    rank_infos = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [LoadedProcess(argv, {**environment, **rank_info}) for rank_info in rank_infos]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not (run / "metrics.jsonl").is_file() or max(steps(run), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} is never logged"
        time.sleep(0.01)


@pytest.mark.slow
def test_checkpoints_by_time_agree_over_the_ranks_and_change_no_loss(
    text: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """By the clock of rank 0 one is due after each step; those of `checkpoint.interval` are kept."""
    run = tmp_path / "run"
    workers = start(text, run, "checkpoint.interval_minutes=1e-9", f"checkpoint.interval={STEPS // 2}")
    assert [worker.wait(LIMIT_S) for worker in workers] == [0, 0]
    last = f"checkpoints/step-{STEPS:06d}"
    assert same_bits(undisturbed / last, run / last) == []
    assert [one["loss"] for one in steps(run).values()] == [one["loss"] for one in steps(undisturbed).values()]
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "checkpoint" for event in events) > STEPS // 2
    kept = ["latest", f"step-{STEPS // 2:06d}", f"step-{STEPS:06d}"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_trap_T45_a_run_stops_after_the_step_and_resumes_bit_for_bit(
    text: Path, tmp_path: Path, undisturbed: Path, signum: signal.Signals
) -> None:
    """One worker of two gets the signal, at some micro-batch of a step; both stop after the same step."""
    run = tmp_path / "run"
    workers = start(text, run)
    try:
        wait_for_step(run, 5)
        workers[1].send_signal(signum)
        assert [worker.wait(LIMIT_S) for worker in workers] == [STOPPED_CODE, STOPPED_CODE]
    finally:
        for worker in workers:
            worker.kill()
    records = [json.loads((run / f"workers/rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(record["state"], record["code"]) for record in records] == [("stopped", STOPPED_CODE)] * 2
    assert not list(run.glob("errors/*"))
    stopped = max(steps(run))
    assert 5 <= stopped < STEPS
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", f"step-{stopped:06d}"]
    assert [worker.wait(LIMIT_S) for worker in start(text, run)] == [0, 0]
    last = f"checkpoints/step-{STEPS:06d}"
    assert same_bits(undisturbed / last, run / last) == []
    assert [one["loss"] for one in steps(run).values()] == [one["loss"] for one in steps(undisturbed).values()]


@pytest.mark.slow
def test_workers_that_are_killed_resume_from_the_last_checkpoint(text: Path, tmp_path: Path, undisturbed: Path) -> None:
    """SIGKILL leaves no time for a checkpoint; steps after the last one are repeated with the same result."""
    run = tmp_path / "run"
    workers = start(text, run, "checkpoint.interval=5")
    try:
        wait_for_step(run, 17)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(LIMIT_S)
    assert not (run / "earlier-1").exists()
    assert [worker.wait(LIMIT_S) for worker in start(text, run, "checkpoint.interval=5")] == [0, 0]
    last = f"checkpoints/step-{STEPS:06d}"
    assert same_bits(undisturbed / last, run / last) == []
    assert [one["loss"] for one in steps(run).values()] == [one["loss"] for one in steps(undisturbed).values()]
