"""The extension point for launchers: their names, what each provides, and a new one in one file."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_moe.cli.options import Launcher
from dist_moe.launch.launcher import OPTIONS, ProcessLauncher, Scheduler, launcher_names, load_launcher
from tests.extending import ROOT, copy_with_local_launcher

SOURCE = ROOT / "dist_moe" / "launch"


def test_the_command_line_accepts_every_launcher() -> None:
    accepted: Any = Launcher
    assert sorted(accepted) == launcher_names() == ["deepspeed", "kubernetes", "mpirun", "slurm", "torchrun"]


@pytest.mark.parametrize("name", launcher_names())
def test_launcher_provides_what_the_protocol_asks_for(name: str) -> None:
    launcher = load_launcher(name)
    assert isinstance(launcher, ProcessLauncher) != isinstance(launcher, Scheduler)
    assert launcher.summary and launcher.options <= OPTIONS.keys()
    assert bool(launcher.runners) == ("runner" in launcher.options)


@pytest.mark.parametrize("module", ["job.py", "launcher.py", "scripts.py", "preflight.py"])
def test_no_module_outside_of_launchers_knows_a_launcher(module: str) -> None:
    text = (SOURCE / module).read_text()
    named = re.findall(rf"[\"']({'|'.join(launcher_names())})[\"']|launchers\.(?:{'|'.join(launcher_names())})\b", text)
    assert not named


def test_finding_the_launchers_imports_neither_torch_nor_the_configuration() -> None:
    code = (
        "import sys; from dist_moe.launch.launchers import launcher_names; names = launcher_names();"
        "print(*names); print(*(name for name in ('torch', 'pydantic', 'ruamel.yaml') if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["deepspeed kubernetes mpirun slurm torchrun", ""]


def test_documented_launcher_needs_one_file(tmp_path: Path) -> None:
    folder = copy_with_local_launcher(tmp_path)
    argv = [sys.executable, "-m", "dist_moe", "launch", "configs/debug.yaml", "--launcher", "local", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*argv, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    # One option a line, each but the last of a command with a backslash.
    first, second = done.stdout.replace(" \\\n    ", " ").splitlines()
    assert "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2" in first and "RANK=1 LOCAL_RANK=1 WORLD_SIZE=2" in second
    assert first.endswith("-m dist_moe train configs/debug.yaml") and second.endswith(first[-37:])
