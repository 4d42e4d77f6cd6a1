"""The commands of the README with real launchers: training, evaluation, generation, and a killed worker."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_moe.worker.network import free_port
from tests.dist.loaded import run_loaded
from tests.selection import only_first

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SHORT = (
    "train.steps=2",
    "observe.interval=1",
    "checkpoint.interval=0",
    "observe.tensorboard=false",
    "train.warmup_steps=1",
)
PLAIN = {
    "deepspeed": (
        *(str(BIN / "deepspeed"), "--no_local_rank", "--num_accelerators", "2", "--master_port", str(free_port())),
        *("--module", "dist_moe"),
    ),
    "torchrun": (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())),
        *("-m", "dist_moe"),
    ),
}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def call(*argv: str) -> str:
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`run_by(launcher)`: a short run by this launcher, without `dist-moe launch`, made once."""

    @functools.cache
    def train(launcher: str) -> Path:
        folder = tmp_path_factory.mktemp(launcher) / "run"
        call(*PLAIN[launcher], "train", "configs/debug.yaml", f"run.dir={folder}", *SHORT)
        return folder

    return train


@pytest.mark.slow
@pytest.mark.full
def test_launchers_without_a_launch_give_the_same_losses(run_by: Callable[[str], Path]) -> None:
    deepspeed, torchrun = (
        [line for line in lines(run_by(name)) if line["event"] != "checkpoint"] for name in ("deepspeed", "torchrun")
    )
    assert [step["loss"] for step in deepspeed[:2]] == [step["loss"] for step in torchrun[:2]]
    assert [step["load"] for step in deepspeed] == [step["load"] for step in torchrun]
    assert deepspeed[-1]["event"] == "validation"


@pytest.mark.slow
def test_evaluate_gives_the_result_of_the_run_and_generate_is_deterministic(
    run_by: Callable[[str], Path], tmp_path: Path
) -> None:
    def dist_moe(*words: str) -> str:
        done = run_loaded([sys.executable, "-m", "dist_moe", *words], tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    checkpoint = run_by("torchrun") / "checkpoints" / "step-000002"
    result = json.loads(dist_moe("evaluate", str(checkpoint), "--json"))
    expected = lines(run_by("torchrun"))[-1]
    assert result["load"] == expected["load"]
    assert result["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
    greedy = ("generate", str(checkpoint), "--prompt", "import os", "--tokens", "5", "--temperature", "0")
    text = dist_moe(*greedy)
    assert text.startswith("import os") and text == dist_moe(*greedy)


@pytest.mark.slow
def test_a_new_run_in_the_same_folder_archives_the_first(run_by: Callable[[str], Path]) -> None:
    folder = run_by("deepspeed")
    before = (folder / "metrics.jsonl").read_bytes()
    again = (f"run.dir={folder}", "checkpoint.resume=never", *SHORT)
    call(sys.executable, "-m", "dist_moe", "train", "configs/debug.yaml", *again)
    assert (folder / "earlier-1" / "metrics.jsonl").read_bytes() == before
    assert (folder / "earlier-1" / "checkpoints" / "step-000002" / "model" / "config.json").is_file()
    events = [("step", 1), ("step", 2), ("checkpoint", 2), ("validation", 2)]
    assert [(line["event"], line["step"]) for line in lines(folder)] == events


@pytest.mark.slow
@pytest.mark.parametrize("launcher", only_first(["deepspeed", "torchrun"]))
def test_a_worker_killed_in_training_ends_the_job_and_is_reported(launcher: str, tmp_path: Path) -> None:
    argv = (str(BIN / "dist-moe"), "launch", "configs/debug.yaml", "--launcher", launcher, f"run.dir={tmp_path}")
    long = ("train.steps=100000", "observe.interval=1", "observe.tensorboard=false")
    job = subprocess.Popen(
        [*argv, *long], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline_s = tmp_path / "metrics.jsonl", time.monotonic() + 150
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert job.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.1)
    pids = [json.loads((tmp_path / "workers" / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_documents_have_no_unfilled_placeholder() -> None:
    assert not [path.name for path in ROOT.glob("*.md") if "@@" in path.read_text()]
