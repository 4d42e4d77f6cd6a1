"""Runs whose disk becomes full, read-only or lost, or whose text changes: what is reported, and what is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import step_folders
from dist_moe.checkpoint.resume import Checkpoint, find_checkpoint
from dist_moe.comm.mesh import Mesh
from dist_moe.config import load_config, resolve
from dist_moe.train.setup import tokenize
from tests.disk import on_disk
from tests.dist.resumable import ROOT, command, overrides_of, same_bits, steps, write_text

CHANGES = ("train.steps=8", "checkpoint.interval=2")
NEVER = "0"
# The disk exists only as long as the process: what the tests look at is copied out at the end.
COPY = 'disk=$0; out=$1; shift; "$@"; code=$?; cp -r "$disk/run" "$out" 2>/dev/null; exit $code'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def train_on_disk(text: Path, disk: Path, size: str, *fault: str) -> subprocess.CompletedProcess[str]:
    """Train with run.dir on a disk of `size`, with a fault (arguments of damaged.py) if any; `out` is what is left."""
    argv = command(text, disk / "run", *CHANGES)
    if fault:
        changes = overrides_of(text, disk / "run", *CHANGES)
        argv = [sys.executable, "-m", "tests.unit.checkpoint.damaged", *fault, *changes]
    return on_disk(disk, size, ["sh", "-c", COPY, str(disk), str(disk.with_name("out")), *argv])


def find_in(text: Path, run: Path) -> Checkpoint | None:
    config = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, run, *CHANGES)), 1).config
    return find_checkpoint(config, tokenize(config), Mesh(1, 0, 1), torch.device("cpu"))


def test_a_full_disk_loses_neither_a_step_nor_an_earlier_checkpoint(text: Path, tmp_path: Path) -> None:
    """Space for one checkpoint: the failures of the others are reported, the run trains to its end, and then fails."""
    done = train_on_disk(text, tmp_path / "disk", "4m")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No space left on device" in done.stdout and "training continues" in done.stdout
    assert "step 8/8" in done.stdout and "step-000008 could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    left = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert left == ["latest", "step-000002"]
    assert list(steps(tmp_path / "out")) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads((tmp_path / "out/workers/rank-0.json").read_text())["state"] == "failed"
    found = find_in(text, tmp_path / "out")
    assert found is not None and found.counters.step == 2 and found.passed_over == ()


@pytest.mark.slow
def test_a_disk_that_is_read_only_for_some_steps_loses_only_the_saves_of_these_steps(
    text: Path, tmp_path: Path
) -> None:
    """From the middle of the asynchronous save of step 4 until before step 8."""
    done = train_on_disk(text, tmp_path / "disk", "16m", "read-only", str(tmp_path / "disk"), "5", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for step in (4, 6):
        assert f"step-{step:06d} could not be saved: [Errno 30] Read-only file system" in done.stdout
    assert "metrics.jsonl can be written again; 3 lines lost" in done.stdout
    left = {path.name for path in (tmp_path / "out/checkpoints").iterdir()}
    assert left - {"step-000004.partial"} == {"latest", "step-000002", "step-000008"}
    assert list(steps(tmp_path / "out")) == [1, 2, 3, 4, 8]
    found = find_in(text, tmp_path / "out")
    assert found is not None and found.counters.step == 8
    assert not (tmp_path / "out/checkpoints/step-000004.partial").exists(), "removed by the next run"


@pytest.mark.slow
def test_a_run_whose_disk_is_unmounted_inside_a_save_saves_below_the_mount_point(text: Path, tmp_path: Path) -> None:
    """The path then leads to the disk below."""
    done = train_on_disk(text, tmp_path / "disk", "16m", "gone", str(tmp_path / "disk"), "5", NEVER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metrics.jsonl was removed, and has been created again" in done.stdout and "Traceback" not in done.stderr
    below = tmp_path / "disk/run"
    assert {6, 8} <= {step for step, _ in step_folders(below / "checkpoints")} <= {4, 6, 8}
    assert list(steps(below)) == [5, 6, 7, 8]
    found = find_in(text, below)
    assert found is not None and found.counters.step == 8


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("mount -o remount,ro none", "Read-only file system"), ("head -c 9m /dev/zero >", "No space left on device")],
)
def test_a_run_whose_folder_cannot_be_written_ends_before_training(
    text: Path, tmp_path: Path, damage: str, reason: str
) -> None:
    disk = tmp_path / "disk"
    command_line = f"{damage} {disk}" if "mount" in damage else f"{damage} {disk}/ballast 2>/dev/null"
    done = on_disk(disk, "1m", ["sh", "-c", f'{command_line}; exec "$@"', "sh", *command(text, disk / "run")])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "preparing text" not in done.stdout
    assert done.stderr.startswith(f"run.dir={disk}/run cannot be written ({reason}: ")
    assert done.stderr.count("\n") == 1 and "set run.dir to a folder on a disk with free space" in done.stderr


@pytest.mark.slow
def test_tokens_that_change_during_a_run_end_it_with_all_steps_saved_and_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are truncated before step 4, where reading them would raise SIGBUS; later the source changes."""
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    text, whole, run = write_text(tmp_path), tmp_path / "whole", tmp_path / "run"
    changes = ("train.steps=6", "checkpoint.interval=2")

    def go(argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)

    done = go(command(text, whole, *changes))
    assert done.returncode == 0, done.stderr
    (tokens,) = (tmp_path / "cache/tokens").glob("*/train.tokens")
    words = overrides_of(text, run, *changes)
    done = go([sys.executable, "-m", "tests.unit.checkpoint.damaged", "cut", str(tokens), "4", NEVER, *words])
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"{tokens} has ") and "start the run again" in done.stderr
    assert [step for step, _ in step_folders(run / "checkpoints")] == [2, 3]
    done = go(command(text, run, *changes))
    assert done.returncode == 0, done.stderr
    assert f"resuming after step 3 from {run}/checkpoints/step-000003" in done.stdout
    assert same_bits(run / "checkpoints/step-000006", whole / "checkpoints/step-000006") == []
    with text.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(CheckpointError, match=r"was trained on \(text\.jsonl was changed \(\d+ bytes, now \d+\)\)"):
        find_in(text, run)
