"""The scripts of `launch/one_machine` and the launcher of the documentation, run as they are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_moe.worker.network import free_port
from tests.extending import ROOT, copy_with_local_launcher
from tests.selection import full, only_first

SHORT = (
    "train.steps=2",
    "train.warmup_steps=1",
    "observe.interval=1",
    "observe.tensorboard=false",
    "checkpoint.interval=0",
)
LIMIT_S = 240
pytestmark = pytest.mark.slow


def backend_and_workers(run_dir: Path) -> tuple[str, int, int]:
    """What a run recorded of itself, and the number of its steps."""
    world = json.loads((run_dir / "run.json").read_text())["world"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return world["backend"], world["workers"], sum(line["event"] == "step" for line in lines)


@pytest.mark.parametrize(("launcher", "backend"), [("deepspeed", "gloo"), full("torchrun", "gloo"), ("mpirun", "mpi")])
def test_one_machine_script_trains(launcher: str, backend: str, tmp_path: Path) -> None:
    variables = {"CONFIG": "configs/debug.yaml", "PYTHON": sys.executable, "PORT": str(free_port()), "THREADS": "1"}
    # OpenMPI refuses to be started by root without both.
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        ["sh", f"launch/one_machine/{launcher}.sh", f"run.dir={tmp_path / 'run'}", *SHORT],
        cwd=ROOT,
        env={**os.environ, **variables, **root},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert backend_and_workers(tmp_path / "run") == (backend, 2, 2)


@pytest.mark.parametrize("signum", only_first([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_to_the_torchrun_script_stops_the_workers_and_nothing_is_left(signum: int, tmp_path: Path) -> None:
    """The signal reaches torchrun itself, nothing of which listens, and its rendezvous has no name."""
    temporary, run_dir = tmp_path / "temporary", tmp_path / "run"
    temporary.mkdir()
    variables = {"CONFIG": "configs/debug.yaml", "PYTHON": sys.executable, "PORT": str(free_port()), "THREADS": "1"}
    argv = ["sh", "launch/one_machine/torchrun.sh", f"run.dir={run_dir}", *SHORT[2:], "train.steps=100000"]
    environment = {**os.environ, **variables, "TMPDIR": str(temporary)}
    with subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as script:
        deadline = time.monotonic() + LIMIT_S / 2
        while '"step"' not in ((run_dir / "metrics.jsonl").read_text() if (run_dir / "metrics.jsonl").exists() else ""):
            assert script.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        open_to_others = [
            each.laddr.ip
            for process in [psutil.Process(script.pid), *psutil.Process(script.pid).children(recursive=True)]
            for each in process.net_connections("inet")
            if each.status == psutil.CONN_LISTEN and each.laddr.ip not in ("127.0.0.1", "::1")
        ]
        script.send_signal(signum)
        script.communicate(timeout=LIMIT_S / 2)
    assert open_to_others == []
    states = [json.loads((run_dir / "workers" / f"rank-{rank}.json").read_text())["state"] for rank in range(2)]
    assert states == ["stopped", "stopped"]
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []


def test_documented_launcher_trains(tmp_path: Path) -> None:
    folder = copy_with_local_launcher(tmp_path)
    run_dir = tmp_path / "run"
    argv = [sys.executable, "-m", "dist_moe", "launch", "configs/debug.yaml", "--launcher", "local", "--workers", "2"]
    done = subprocess.run(
        [*argv, f"run.dir={run_dir}", "run.threads=1", *SHORT],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert backend_and_workers(run_dir) == ("gloo", 2, 2)
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
