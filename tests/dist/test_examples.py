"""The files of examples/ run as their README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_example_is_listed() -> None:
    listed = re.findall(r"\]\(([\w.]+)\)", (ROOT / "examples" / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.slow
def test_the_custom_loop_trains_on_two_workers(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    changes = ["train.steps=3", f"run.dir={tmp_path}"]
    argv = [*torchrun, "examples/custom_loop.py", "configs/debug.yaml", *changes]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step (\d): MaxVio \d\.\d+, load of each expert \[(.*)\]$", done.stdout, re.M)
    assert [step for step, _ in lines] == ["1", "2", "3"]
    loads = [[int(load) for load in text.split(",")] for _, text in lines]
    assert all(sum(load) == sum(loads[0]) > 0 and len(load) == 12 for load in loads), "top 2 of the same tokens"
