"""Tests of the control of live programs, with workers without a model."""

import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from benchmarks.environment import cores
from benchmarks.row import Row
from benchmarks.step.gate import counted_bytes
from benchmarks.step.measure import count_bytes
from benchmarks.step.programs import rank_environments
from benchmarks.step.session import Command, Session, SessionError, Turn
from benchmarks.tables import exchanged

NEVER = "1000000"


def session(log: Path, last: str = NEVER) -> Session:
    """Two trivial workers."""
    argv = (sys.executable, "-m", "tests.unit.benchmarks.trivial", last)
    return Session([Command(argv, environment) for environment in rank_environments(2, {})], 2, log)


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_workers_make_the_steps_of_a_turn_and_wait(tmp_path: Path) -> None:
    before = children()
    with session(tmp_path / "log") as live:
        assert live.start_s > 0
        first, second = live.run(1), live.run(3)
        # The loss is the mean over the ranks, of the last step of the turn; loads are summed over the ranks.
        assert (first.loss, second.loss) == (1.5, 4.5)
        assert second.loads == [[2, 2]] and second.peak_mib > 1 and 0 < second.seconds < 5
        assert isinstance(second, Turn) and len(children() - before) == 2
    assert children() == before


def test_a_worker_that_ends_is_an_error_with_its_output(tmp_path: Path) -> None:
    before = children()
    with (
        pytest.raises(SessionError, match=r"(?s)a worker .*rank 1 has an error"),
        session(tmp_path / "log", "3") as live,
    ):
        live.run(5)
    assert children() == before


def test_a_worker_that_does_not_start_is_an_error_with_its_output(tmp_path: Path) -> None:
    command = Command((sys.executable, "-c", "raise SystemExit('no model')"), rank_environments(1, {})[0])
    with (
        pytest.raises(SessionError, match=r"(?s)ended before its first step.*no model"),
        Session([command], 1, tmp_path / "log"),
    ):
        pass


def test_the_bytes_of_collectives_are_counted(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found: dict[str, int] = {}
        with counted_bytes(found):
            dist.all_reduce(torch.zeros(10))
            dist.all_to_all_single(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
        dist.all_reduce(torch.zeros(10))
    finally:
        dist.destroy_process_group()
    assert found == {"all_reduce": 40, "all_to_all_single": 32}


def test_a_failed_count_of_bytes_keeps_the_measurement(tmp_path: Path) -> None:
    row, lines = Row("ours-gloo", seconds=[1.0]), list[str]()
    with session(tmp_path / "log", "2") as live:
        assert live.run(1).bytes == {}
        count_bytes([(row, live)], lines.append)
    assert row.measured and row.seconds == [1.0] and row.bytes == {}
    assert len(lines) == 1 and "ours-gloo: the bytes of its collectives were not counted: a worker" in lines[0]
    assert exchanged(row) == "not counted"
    assert exchanged(Row("ours-gloo", bytes={"all_to_all_single": 2_000_000, "all_reduce": 500_000})) == "2.0 + 0.5"


def test_each_worker_is_bound_to_the_core_of_its_rank() -> None:
    assert cores() == sorted(set(cores())) and cores()
