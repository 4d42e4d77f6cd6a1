"""The console script, with this package and with another one named dist_moe."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dist_moe

ROOT = Path(__file__).resolve().parents[2]


def run_entry(*path: Path, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the console script's function in a new interpreter that finds packages in `path` first."""
    code = "import sys; from dist_moe.cli.main import main; sys.argv[0] = 'dist-moe'; main()"
    # -P: the interpreter must not look for packages in the folder where it runs.
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "DISTRIBUTION = 'dist-moe'"])
def test_an_overwritten_package_is_refused_with_its_path_and_a_remedy(tmp_path: Path, text: str) -> None:
    shutil.copytree(ROOT / "dist_moe", tmp_path / "dist_moe")
    (tmp_path / "dist_moe" / "__init__.py").write_text(text)
    done = run_entry(tmp_path, arguments=("--help",))
    assert done.returncode == 2 and done.stdout == ""
    assert str(tmp_path / "dist_moe" / "__init__.py") in done.stderr and "belongs to another" in done.stderr
    assert "dist-moe-train" in done.stderr and "pip uninstall dist-moe" in done.stderr
    assert "Traceback" not in done.stderr


def test_our_dist_moe_runs_its_command_line() -> None:
    done = run_entry(ROOT, arguments=("--help",))
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout and "train" in done.stdout


@pytest.mark.parametrize("module", ["dist_moe", "dist_moe.cli.main"])
def test_python_m_runs_the_same_command_line(module: str) -> None:
    argv = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout and "train" in done.stdout


def test_the_package_names_its_distribution() -> None:
    assert dist_moe.DISTRIBUTION == "dist-moe-train"


@pytest.mark.parametrize(
    ("closed", "argument", "code"), [(">&-", "--version", 0), ("<&- >&- 2>&-", "--version", 0), ("2>&-", "--wrong", 2)]
)
def test_closed_streams_are_no_error_and_no_file_takes_their_place(closed: str, argument: str, code: int) -> None:
    line = f'exec "$0" -m dist_moe {argument} {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_children_of_a_command_with_closed_streams_write_into_no_file(tmp_path: Path) -> None:
    code = """
import subprocess, sys
from dist_moe.status import open_closed_streams
open_closed_streams()
with open(sys.argv[1], "w") as file:
    subprocess.run(["echo", "of a child"], check=True)
    print("of this process", flush=True)
    file.write("its own text")
"""
    line = 'exec "$0" -c "$1" "$2" <&- >&-'
    argv = ["sh", "-c", line, sys.executable, code, str(tmp_path / "file")]
    subprocess.run(argv, timeout=60, check=True)
    assert (tmp_path / "file").read_text() == "its own text"
