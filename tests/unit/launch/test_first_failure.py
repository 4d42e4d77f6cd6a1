"""How an end is told, and which of several failures is named."""

import os
import signal
from pathlib import Path

import pytest

from dist_moe.launch.supervise import run_job
from dist_moe.launch.supervise.first_failure import Failure, failure_of, silent_end
from dist_moe.launch.supervise.process_tree import read_process
from dist_moe.worker import exit as worker_exit


def reported(rank: int, error: Exception, code: int = 1) -> Failure:
    """What the worker's report says, in the words that the launch reads."""
    return failure_of(worker_exit.error_report(rank, error, code, "Traceback\n"), rank, Path(f"errors/rank-{rank}.txt"))


def test_the_earlier_report_is_named() -> None:
    first = reported(1, ValueError("first: a\n\nb"), code=7)
    second = reported(0, KeyError("second"))
    assert min(second, first) is first
    assert first.code == 7
    assert first.text == "rank 1 failed with ValueError: first: a\n\nb\n(traceback: errors/rank-1.txt)"


def test_a_lost_connection_is_not_named_where_its_cause_is_known() -> None:
    effect = reported(0, RuntimeError("Read error [127.0.0.1]:49368: Connection reset by peer."))
    cause = reported(1, ValueError("the cause, and late"))
    assert min(effect, cause) is cause


def test_a_kill_is_named_before_an_error_that_was_seen_a_little_earlier() -> None:
    seen = reported(0, RuntimeError("NCCL operation failed"))
    killed = silent_end(seen.time + 0.5, 1, -signal.SIGKILL, finished=False)
    assert min(seen, killed) is killed
    assert killed.text.startswith("rank 1 was ended by SIGKILL (signal 9); often the kernel did it for want of memory")


def test_a_worker_that_a_launcher_ended_is_not_named() -> None:
    seen = reported(0, ValueError("boom"))
    assert min(silent_end(seen.time + 0.5, 1, -signal.SIGTERM, finished=False), seen) is seen


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
def test_exit_codes_of_silent_ends(code: int, finished: bool, expected: int) -> None:
    assert silent_end(0.0, 3, code, finished).code == expected


def test_both_sides_mean_the_same_variable_and_the_same_process() -> None:
    me = read_process(os.getpid())
    assert me
    assert run_job.LAUNCH_VARIABLE == worker_exit.LAUNCH_VARIABLE
    assert run_job.STOPPED_CODE == worker_exit.STOPPED_CODE
    assert worker_exit.start_time(os.getpid()) == me.start_time
