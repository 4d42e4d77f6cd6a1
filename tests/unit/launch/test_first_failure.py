"""The message of a failure, and which of several failures is reported."""

import signal
from pathlib import Path

import pytest

from dist_moe.checkpoint.errors import CheckpointError, JobCheckpointError, RunChangedError
from dist_moe.launch.supervise.first_failure import Failure, failure_from_exit, failure_from_report
from dist_moe.worker import exit as worker_exit


def reported(rank: int, error: Exception, code: int = 1) -> Failure:
    """The failure that the launch reads from a worker's error report."""
    report = worker_exit.error_report(rank, error, code, "Traceback\n")
    return failure_from_report(report, rank, Path(f"errors/rank-{rank}.txt"))


def test_the_earlier_report_comes_first() -> None:
    first = reported(1, ValueError("first: a\n\nb"), code=7)
    second = reported(0, KeyError("second"))
    assert min(second, first) is first
    assert first.code == 7
    assert first.text == "rank 1 failed with ValueError: first: a\n\nb\n(traceback: errors/rank-1.txt)"


def test_a_lost_connection_comes_after_its_cause() -> None:
    consequence = reported(0, RuntimeError("Read error [127.0.0.1]:49368: Connection reset by peer."))
    cause = reported(1, ValueError("the cause, and late"))
    assert min(consequence, cause) is cause


def test_a_kill_comes_before_an_error_that_it_caused() -> None:
    seen = reported(0, RuntimeError("NCCL operation failed"))
    killed = failure_from_exit(seen.time + 0.5, 1, -signal.SIGKILL, finished=False)
    assert min(seen, killed) is killed
    assert killed.text.startswith(
        "rank 1 was ended by SIGKILL (signal 9); the kernel often does this when memory runs out"
    )


def test_a_worker_that_a_launcher_ended_does_not_come_first() -> None:
    seen = reported(0, ValueError("boom"))
    assert min(failure_from_exit(seen.time + 0.5, 1, -signal.SIGTERM, finished=False), seen) is seen


@pytest.mark.parametrize(
    ("code", "finished", "expected"),
    [
        (0, True, 0),
        (0, False, 1),
        (5, True, 5),
        (5, False, 5),
        (-signal.SIGSEGV, True, 139),
        (-signal.SIGRTMIN - 3, False, 128 + signal.SIGRTMIN + 3),
    ],
)
def test_failure_from_exit_has_the_exit_code_of_the_job(code: int, finished: bool, expected: int) -> None:
    assert failure_from_exit(0.0, 3, code, finished).code == expected


@pytest.mark.parametrize("kind", [JobCheckpointError, RunChangedError])
def test_what_every_rank_reports_is_not_attributed_to_one(kind: type[CheckpointError]) -> None:
    failure = reported(1, kind("step-000002 belongs to another run"), code=2)
    assert (failure.text, failure.code, failure.of_job) == ("step-000002 belongs to another run", 2, True)
    assert reported(1, CheckpointError("one file"), code=2).text.startswith(
        "rank 1 failed with CheckpointError: one file"
    )
