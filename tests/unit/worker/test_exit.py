"""How a worker reports its end: real processes, their exit codes, and the files that they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.worker.contract import process_identity

LIMIT_S = 30.0
OPENING = """
import contextlib, sys, threading, time
from dist_moe.worker.exit import exit_hard, report_failure
from dist_moe.config import ConfigError, Violation

@contextlib.contextmanager
def slow_teardown():
    try:
        yield
    finally:
        time.sleep(600)
"""


def run_worker(run_dir: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a worker of rank 3 whose code is `body`."""
    program = f"{OPENING}\nwith report_failure({str(run_dir)!r}, 3):\n    {body}\n"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def record(run_dir: Path) -> dict[str, object]:
    """The record of rank 3."""
    return json.loads((run_dir / "workers" / "rank-3.json").read_text())


@pytest.mark.parametrize("body", ["pass", "sys.exit()", "sys.exit(0)"])
def test_success_is_recorded_and_an_old_error_removed(tmp_path: Path, body: str) -> None:
    error = tmp_path / "errors" / "rank-3.txt"
    error.parent.mkdir()
    error.write_text("of an earlier run")
    assert run_worker(tmp_path, body).returncode == 0
    assert record(tmp_path)["state"] == "finished"
    assert not error.exists()


@pytest.mark.parametrize(
    ("body", "code", "exception", "message"),
    [
        ("raise ValueError('boom')", 1, "ValueError", "boom"),
        ("sys.exit('no')", 1, "SystemExit", "no"),
        ("sys.exit(7)", 7, "SystemExit", "7"),
        ("raise MemoryError", 1, "MemoryError", ""),
        (
            "raise ConfigError([Violation('a.b', 1, 'is odd', 'use 2')])",
            2,
            "ConfigError",
            "a.b=1 is odd; use 2",
        ),
    ],
)
def test_a_failure_is_reported(tmp_path: Path, body: str, code: int, exception: str, message: str) -> None:
    done = run_worker(tmp_path, body)
    text = (tmp_path / "errors" / "rank-3.txt").read_text()
    head, trace = text.split("\n\n", 1)
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert done.returncode == code
    assert (fields["rank"], fields["code"], fields["exception"]) == ("3", str(code), exception)
    assert json.loads(fields["message"]) == message
    assert trace.startswith("Traceback")
    assert record(tmp_path)["state"] == "failed"
    assert (trace in done.stderr) == (exception != "ConfigError")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"rank-3.txt", "rank-3.json"}


def test_ctrl_c_is_not_reported_as_an_error(tmp_path: Path) -> None:
    assert run_worker(tmp_path, "raise KeyboardInterrupt").returncode == 130
    assert not (tmp_path / "errors" / "rank-3.txt").exists()


def test_output_is_flushed_before_the_exit(tmp_path: Path) -> None:
    done = run_worker(tmp_path, "print('last words'); raise ValueError")
    assert done.stdout == "last words\n"


def test_trap_T34_a_failed_worker_does_not_wait_for_its_teardown(tmp_path: Path) -> None:
    body = f"""
    with slow_teardown(), exit_hard({str(tmp_path)!r}, 3):
        threading.Thread(target=time.sleep, args=(600,)).start()
        raise ValueError('boom')
    """
    assert run_worker(tmp_path, body.strip()).returncode == 1


def test_a_report_that_cannot_be_written_does_not_delay_the_exit(tmp_path: Path) -> None:
    (tmp_path / "errors").write_text("a file where a folder should be")
    program = f"{OPENING}\nwith exit_hard({str(tmp_path)!r}, 3):\n    raise ValueError('boom')\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1
    assert "ValueError: boom" in done.stderr
    assert record(tmp_path)["state"] == "failed"


def test_a_worker_ends_with_the_launch_that_started_it(tmp_path: Path) -> None:
    launch = subprocess.Popen(["sleep", "600"])
    identity = process_identity(launch.pid)
    program = f"{OPENING}\nwith report_failure({str(tmp_path)!r}, 0):\n    print(flush=True); time.sleep(600)"
    environment = {**os.environ, "DIST_MOE_LAUNCH": identity}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as worker:
        assert worker.stdout and worker.stdout.readline() == b"\n"
        assert worker.poll() is None
        launch.kill()
        assert worker.wait(timeout=LIMIT_S) == 1
    launch.wait()


@pytest.mark.parametrize("reused", [False, True])
def test_a_worker_whose_launch_is_gone_exits_before_its_work(tmp_path: Path, reused: bool) -> None:
    with subprocess.Popen(["sleep", "600"]) as launch:
        identity = process_identity(launch.pid)
        launch.kill()
        launch.wait()
        if reused:  # as if a later process had the pid now
            identity = f"{os.getpid()}:{identity.partition(':')[2]}"
        done = run_worker(tmp_path, "print('begun')", DIST_MOE_LAUNCH=identity)
    assert (done.returncode, done.stdout) == (1, "")
