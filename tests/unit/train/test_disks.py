"""Runs whose disk gets full, read-only or lost, and whose text changes: what is told, and what is there afterwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import checkpoints
from dist_moe.checkpoint.resume import Checkpoint, find_checkpoint
from dist_moe.comm.mesh import Mesh
from dist_moe.config import load_config, resolve
from dist_moe.train.setup import tokenize
from tests.disk import on_disk
from tests.dist.resumable import ROOT, command, overrides_of, same_bits, steps, write_text

CHANGES = ("train.steps=8", "checkpoint.interval=2")
NEVER = "0"
# What the tests look at lies on the disk, which goes with the process: it is copied out at the end.
COPY = 'disk=$0; out=$1; shift; "$@"; code=$?; cp -r "$disk/run" "$out" 2>/dev/null; exit $code'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def trained(text: Path, disk: Path, size: str, *blow: str) -> subprocess.CompletedProcess[str]:
    """Train with all of run.dir on a disk of its own, and strike it, unless `blow` is empty; `out` is what is left."""
    argv = command(text, disk / "run", *CHANGES)
    if blow:
        changes = overrides_of(text, disk / "run", *CHANGES)
        argv = [sys.executable, "-m", "tests.unit.checkpoint.damaged", *blow, *changes]
    return on_disk(disk, size, ["sh", "-c", COPY, str(disk), str(disk.with_name("out")), *argv])


def found_in(text: Path, run: Path) -> Checkpoint | None:
    config = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, run, *CHANGES)), 1).config
    return find_checkpoint(config, tokenize(config), Mesh(1, 0, 1), torch.device("cpu"))


def test_a_full_disk_costs_neither_a_step_nor_an_earlier_checkpoint(text: Path, tmp_path: Path) -> None:
    """Room for one checkpoint: the others are told, the run trains to its end, and then fails."""
    done = trained(text, tmp_path / "disk", "4m")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No space left on device" in done.stdout and "training continues" in done.stdout
    assert "step 8/8" in done.stdout and "step-000008 could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    left = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert left == ["latest", "step-000002"]
    assert list(steps(tmp_path / "out")) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads((tmp_path / "out/workers/rank-0.json").read_text())["state"] == "failed"
    found = found_in(text, tmp_path / "out")
    assert found is not None and found.counters.step == 2 and found.passed_over == ()


def test_a_disk_that_is_read_only_inside_a_save_and_works_again_costs_what_was_due_then(
    text: Path, tmp_path: Path
) -> None:
    """It is so from the middle of a save beside training, that of step 4, until before step 8."""
    done = trained(text, tmp_path / "disk", "16m", "read-only", str(tmp_path / "disk"), "5", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for step in (4, 6):
        assert f"step-{step:06d} could not be saved: [Errno 30] Read-only file system" in done.stdout
    assert "metrics.jsonl is written again; 3 lines are lost" in done.stdout
    left = {path.name for path in (tmp_path / "out/checkpoints").iterdir()}
    assert left - {"step-000004.partial"} == {"latest", "step-000002", "step-000008"}
    assert list(steps(tmp_path / "out")) == [1, 2, 3, 4, 8]
    found = found_in(text, tmp_path / "out")
    assert found is not None and found.counters.step == 8
    assert not (tmp_path / "out/checkpoints/step-000004.partial").exists(), "removed by the next run"


def test_a_disk_that_vanishes_inside_a_save_leaves_a_run_that_saves_where_its_path_leads(
    text: Path, tmp_path: Path
) -> None:
    """Onto the disk below: it is what the path leads to from then on."""
    done = trained(text, tmp_path / "disk", "16m", "gone", str(tmp_path / "disk"), "5", NEVER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metrics.jsonl was gone, and is begun anew" in done.stdout and "Traceback" not in done.stderr
    below = tmp_path / "disk/run"
    assert {6, 8} <= {step for step, _ in checkpoints(below / "checkpoints")} <= {4, 6, 8}
    assert list(steps(below)) == [5, 6, 7, 8]
    found = found_in(text, below)
    assert found is not None and found.counters.step == 8


@pytest.mark.parametrize(
    ("damage", "told"),
    [("mount -o remount,ro none", "Read-only file system"), ("head -c 9m /dev/zero >", "No space left on device")],
)
def test_a_run_whose_folder_cannot_be_written_ends_before_it_trains(
    text: Path, tmp_path: Path, damage: str, told: str
) -> None:
    disk = tmp_path / "disk"
    place = f"{damage} {disk}" if "mount" in damage else f"{damage} {disk}/ballast 2>/dev/null"
    done = on_disk(disk, "1m", ["sh", "-c", f'{place}; exec "$@"', "sh", *command(text, disk / "run")])
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"run.dir={disk}/run cannot be written ({told}: ")
    assert done.stderr.count("\n") == 1 and "name a folder on a disk that has room" in done.stderr


def test_tokens_that_change_under_a_run_end_it_with_all_steps_saved_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get shorter before step 4, where reading them would end the process by a signal; then the source does."""
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
    assert [step for step, _ in checkpoints(run / "checkpoints")] == [2, 3]
    done = go(command(text, run, *changes))
    assert done.returncode == 0, done.stderr
    assert f"resuming after step 3 from {run}/checkpoints/step-000003" in done.stdout
    assert same_bits(run / "checkpoints/step-000006", whole / "checkpoints/step-000006") == []
    with text.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(CheckpointError, match=r"has learned from \(text\.jsonl was changed \(\d+ bytes, now \d+\)\)"):
        found_in(text, run)
