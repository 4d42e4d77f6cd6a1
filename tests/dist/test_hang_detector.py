"""Collectives that time out: what the report says of the ranks that arrived, and of those that did not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.comm.exchange import exchange_rows
from dist_moe.comm.init import init_distributed, set_pg_timeouts
from dist_moe.comm.mesh import make_mesh
from dist_moe.health.hang_detector import HangError, Position, format_report, hang_detector
from dist_moe.worker.network import free_port
from dist_moe.worker.rank_info import rank_info_from_env
from tests.dist.pool import RankError, RankPool
from tests.dist.resumable import ROOT, command, overrides_of, steps, write_text
from tests.dist.workers import direct
from tests.selection import slow

LIMIT_S = 3.0


def endless(rank: int, world_size: int) -> tuple[str, float]:
    """Rank 1 is in a loop, while rank 0 waits for it in the exchange of the expert-parallel group, for some seconds."""
    mesh = make_mesh(2, shared_memory=False)  # which would make collective calls of its own
    assert mesh.ep_group is not None
    set_pg_timeouts(LIMIT_S)
    rows = torch.ones(2, 3)
    try:
        with hang_detector(rank, world_size, LIMIT_S) as detector:
            detector.set_step(7)
            exchange_rows([rows, rows], [1, 1], [1, 1], mesh.ep_group)
            if rank == 1:
                return busy_loop(), 0.0
            started_s = time.monotonic()
            exchange_rows([rows, rows], [1, 1], [1, 1], mesh.ep_group)  # both start before the first is awaited
    except HangError as error:
        return str(error), time.monotonic() - started_s
    return "no error", 0.0


def busy_loop() -> str:
    """Run Python code for two time-outs."""
    end = time.monotonic() + 2 * LIMIT_S
    while time.monotonic() < end:
        sum(range(1000))
    return "done"


def test_trap_T30_a_rank_that_does_not_arrive_is_named_with_its_line_also_in_a_sub_group(ranks: RankPool) -> None:
    (first, waited_s), (second, _) = ranks.run(endless, 2)
    assert second == "done" and waited_s < 10 * LIMIT_S
    assert first.startswith("all_to_all_single number 3 of ranks 0, 1 timed out (parallel.timeout_s=3)")
    assert "arrived: rank 0; not arrived: rank 1; rank 1 is in no collective, step 7, for " in first
    assert "at busy_loop:" in first
    assert "rank 0 is in all_to_all_single number 3, step 7, for " in first
    assert re.search(
        r"at RowsExchange\.end:\d+ < _Finish\.forward:\d+ < RowsExchange\.finish:\d+ < exchange_rows:\d+", first
    )


def endless_in_detail(rank: int, world_size: int, port: int) -> tuple[str, float]:
    """The same where torch compares the arguments of every collective, by groups of its own."""
    dist.destroy_process_group()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    os.environ["MASTER_PORT"] = str(port)
    try:
        with init_distributed(rank_info_from_env(os.environ), "gloo", LIMIT_S):
            return endless(rank, world_size)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


@pytest.mark.slow
def test_a_rank_that_does_not_arrive_is_named_at_torchs_debug_level_detail(ranks: RankPool) -> None:
    (first, waited_s), (second, _) = ranks.run(endless_in_detail, 2, free_port())
    assert second == "done" and waited_s < 10 * LIMIT_S
    # The comparison comes before the collective is counted.
    assert first.startswith("all_to_all_single number 2 of ranks 0, 1 timed out (parallel.timeout_s=3)")
    assert "not arrived: rank 1; rank 1 is in no collective, step 7, for " in first


def mismatched(rank: int, world_size: int) -> str:
    """Rank 1 is one collective ahead, in a group of two of three; the third is in neither."""
    group = dist.new_group([0, 1])
    set_pg_timeouts(LIMIT_S)
    if rank == 2:
        time.sleep(2.5 * LIMIT_S)
        return ""
    try:
        with hang_detector(rank, world_size, LIMIT_S):
            if rank == 0:
                dist.all_to_all_single(torch.zeros(2), torch.ones(2), group=group)
            else:
                dist.broadcast(torch.zeros(2), src=0)
    except HangError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_ranks_in_different_collectives_are_distinguished(ranks: RankPool) -> None:
    first, second, _ = ranks.run(mismatched, 3)
    assert first.startswith("all_to_all_single number 1 of ranks 0, 1 timed out")
    assert "arrived: rank 0; not arrived: rank 1; rank 1 is in broadcast number " in first
    assert "rank 2" not in first, "it is not in the group"
    assert second.startswith("broadcast number 2 of ranks 0, 1, 2") and "(stopped, dead or cut off): rank 2" in second
    assert "not arrived: rank 0; rank 0 is in all_to_all_single number 1" in second


def late(rank: int, world_size: int) -> str:
    """Ranks 0 and 1 wait, rank 2 arrives before they time out, rank 3 never does."""
    dist.barrier()
    set_pg_timeouts(LIMIT_S)
    if rank == 3:
        time.sleep(4 * LIMIT_S)
        return ""
    time.sleep(LIMIT_S / 2 if rank == 2 else 0)
    try:
        with hang_detector(rank, world_size, LIMIT_S):
            dist.all_reduce(torch.ones(1))
    except HangError as error:
        report = str(error)
    except RuntimeError:
        report = ""  # a rank that timed out before has closed its connections
    time.sleep(2 * LIMIT_S)
    return report


@pytest.mark.slow
def test_trap_T30_a_rank_that_arrived_late_is_not_blamed(ranks: RankPool) -> None:
    """Neither one that writes its own report, nor one whose peers closed their connections."""
    reports = [report for report in ranks.run(late, 4) if report]
    assert reports
    for report in reports:
        assert "arrived: rank 0, 1, 2; not arrived and not answering (stopped, dead or cut off): rank 3" in report


@pytest.mark.parametrize("stopped", [1, slow(0)])
def test_trap_T34_a_stopped_worker_is_named_and_the_other_ends(tmp_path: Path, stopped: int) -> None:
    """SIGSTOP in training: rank 1 is reported as not answering; without rank 0 there is no store to ask."""
    text, run = write_text(tmp_path), tmp_path / "run"
    argv = command(text, run, "train.steps=100000", "train.schedule_steps=null", f"parallel.timeout_s={LIMIT_S}")
    with direct(argv, 2, tmp_path / "log") as workers:
        wait_for_step(run, 3)
        os.kill(workers[stopped].pid, signal.SIGSTOP)
        assert workers[1 - stopped].wait(60) == 1
    report = (run / f"errors/rank-{1 - stopped}.txt").read_text()
    assert "exception: HangError" in report and "timed out (parallel.timeout_s=3)" in report
    if stopped == 1:
        assert "not arrived and not answering (stopped, dead or cut off): rank 1; rank 0 is in " in report
    else:
        assert "the job's store does not answer: the process that hosts it (rank 0; under torchrun" in report


@pytest.mark.slow
def test_the_launch_names_the_rank_that_did_not_arrive_and_not_one_that_lost_a_connection(tmp_path: Path) -> None:
    """Of four ranks three wait: the first that times out frees the others, and the launch prints its report.

    torchrun ends all others as soon as one has ended.
    """
    text, run = write_text(tmp_path), tmp_path / "run"
    words = ("train.steps=100000", "train.schedule_steps=null", f"parallel.timeout_s={LIMIT_S}")
    argv = [sys.executable, "-m", "dist_moe", "launch", "configs/debug.yaml", *overrides_of(text, run, *words)]
    with (tmp_path / "log").open("wb") as log:
        launch = subprocess.Popen([*argv, "--launcher", "torchrun", "--workers", "4"], cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_for_step(run, 3)
            os.kill(json.loads((run / "workers/rank-3.json").read_text())["pid"], signal.SIGSTOP)
            assert launch.wait(90) == 1
        finally:
            launch.kill()
            launch.wait()
    message = (tmp_path / "log").read_text().rpartition("failed with HangError: ")[2].splitlines()[0]
    assert "not arrived and not answering (stopped, dead or cut off): rank 3" in message


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or max(steps(run), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} is never logged"
        time.sleep(0.02)


def slow_storage(rank: int, world_size: int) -> None:
    """Raise an error that mentions a time-out and does not come from a collective."""
    with hang_detector(rank, world_size, LIMIT_S):
        raise CheckpointError("step-000003 could not be saved: [Errno 110] Connection timed out")


def test_an_error_of_a_storage_is_not_a_hang(ranks: RankPool) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(slow_storage, 2)
    assert all(
        "CheckpointError: step-000003 could not be saved" in failure for failure in raised.value.failures.values()
    )
    assert "HangError" not in str(raised.value)


HERE = Position(3, "all_reduce", 9, (0, 1, 2), "f:1", 8.0)


def test_format_report_where_all_have_arrived_and_where_the_store_does_not_answer() -> None:
    others: dict[int, Position | None] = {1: HERE, 2: HERE}
    assert "arrived: rank 0, 1, 2; all ranks arrived, so it was slow" in format_report(0, HERE, others, 8)
    alone = format_report(0, HERE, None, 8)
    assert "rank 0 is in all_reduce number 9, step 3, for 8 s, at f:1" in alone and "rank 1" not in alone
