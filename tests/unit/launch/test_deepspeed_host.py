"""DeepSpeed's launcher of one host: imported without torch, with it where it needs it, and the same for its workers."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OURS = ("-m", "dist_moe.launch.deepspeed_host")
HEAVY = {"torch._C", "numpy", "deepspeed.comm", "deepspeed.runtime"}
NEEDS_ALL = {
    "__init__.py": "import sys\nsys.modules['deepspeed'].whole = True",
    "utils/__init__.py": "",
    "utils/logging.py": "logger = set_log_level_from_string = None",
    "utils/numa.py": "get_numactl_cmd = None",
    "launcher/__init__.py": "",
    "launcher/launch.py": "import deepspeed\ndef main(): print('whole', deepspeed.whole)",
}
"""A DeepSpeed whose launcher uses more of it: file -> text."""
WRITE_ENVIRONMENT = """
import json, os, sys
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(dict(os.environ), file)
"""
NOT_OF_THE_LAUNCHER = {"PYTHONPATH", "PYTORCH_NVML_BASED_CUDA_CHECK"}
"""Variables that differ from one test to another, and that the import of DeepSpeed sets, as it does in each worker."""


def run_python(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python on a host without accelerators, with the packages of `path` first."""
    variables = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | variables, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done


def test_trap_T56_the_launcher_of_deepspeed_starts_without_torch() -> None:
    done = run_python("-X", "importtime", *OURS, "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "usage: deepspeed_host.py" in done.stdout and "--bind_cores_to_rank" in done.stdout
    assert "deepspeed.accelerator.cpu_accelerator" in imported
    assert HEAVY & imported == set()


def test_a_launcher_that_uses_more_of_deepspeed_gets_all_of_it(tmp_path: Path) -> None:
    for name, text in NEEDS_ALL.items():
        file = tmp_path / "deepspeed" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert run_python(*OURS, path=tmp_path).stdout == "whole True\n"


def environments(launcher: Sequence[str], folder: Path) -> list[dict[str, str]]:
    """Run a launcher with a worker that writes its environment; return those of ranks 0 and 1."""
    folder.mkdir()
    (folder / "write_environment.py").write_text(WRITE_ENVIRONMENT)
    options = ("--master_addr", "127.0.0.1", "--master_port", "29555", "--log_level", "error", "--no_local_rank")
    assert run_python(*launcher, *options, "--module", "write_environment", str(folder), path=folder).stdout == ""
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return [{name: value for name, value in each.items() if name not in NOT_OF_THE_LAUNCHER} for each in found]


@pytest.mark.slow
def test_workers_get_the_environment_that_the_program_deepspeed_gives_them(tmp_path: Path) -> None:
    world_info = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
    ours = environments((*OURS, f"--world_info={world_info}"), tmp_path / "ours")
    program = str(Path(sys.executable).parent / "deepspeed")
    hosts = ("--hostfile", os.devnull, "--num_accelerators", "2")
    assert environments((program, *hosts), tmp_path / "theirs") == ours
    assert [each["RANK"] for each in ours] == ["0", "1"] and ours[1]["CUDA_VISIBLE_DEVICES"] == "0,1"
