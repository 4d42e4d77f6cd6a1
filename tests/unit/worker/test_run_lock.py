"""Who comes second in a run's folder is refused before any file there is touched, whatever started either of them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.config import dump_config, load_config
from dist_moe.worker import run_lock
from dist_moe.worker.run_lock import RunInUseError, lock_for_launch, lock_for_worker
from tests.selection import slow

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 60.0
HOLD = """
import sys
from pathlib import Path
from dist_moe.worker.run_lock import lock_for_launch, lock_for_worker
lock = lock_for_launch(Path(sys.argv[1])) if sys.argv[2] == "launch" else lock_for_worker(
    Path(sys.argv[1]), 0, sys.argv[2] == "launched"
)
with lock:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["by hand", "launched", "launch"])
def first(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Another process that uses the folder: a worker started by hand, one of a launch that is gone, or a launch."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path), request.param]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield request.param
        process.stdin.close()
        assert process.wait(LIMIT_S) == 0


def test_a_second_run_is_refused(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "ORPHAN_S", 0.1)
    message = f"run.dir={tmp_path} is in use by a running job; wait for it, end it, or set another run.dir"
    with pytest.raises(RunInUseError) as error, lock_for_launch(tmp_path):
        pass
    assert str(error.value) == message
    with pytest.raises(RunInUseError), lock_for_worker(tmp_path, 0, launched=False):
        pass


def test_the_workers_of_a_launch_take_their_locks_while_it_has_its_own(tmp_path: Path) -> None:
    with (
        lock_for_launch(tmp_path),
        lock_for_worker(tmp_path, 0, launched=True),
        lock_for_worker(tmp_path, 1, launched=True),
    ):
        pass
    with lock_for_launch(tmp_path):
        pass


def test_a_restarted_worker_waits_for_the_end_of_the_one_before_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLD, str(tmp_path), "launched"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        threading.Timer(0.5, process.kill).start()
        began = time.monotonic()
        with lock_for_worker(tmp_path, 0, launched=True):
            assert time.monotonic() - began > 0.3


@pytest.mark.parametrize("command", ["train", slow("launch")])
def test_the_second_command_changes_no_file(tmp_path: Path, command: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("of the first run\n")
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(load_config(ROOT / "configs" / "debug.yaml", [f"run.dir={run_dir}"])))
    with lock_for_worker(run_dir, 0, launched=False):
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-m", "dist_moe", command, str(config)]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr == (
            f"run.dir={run_dir} is in use by a running job; wait for it, end it, or set another run.dir\n"
        )
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
