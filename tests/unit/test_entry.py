"""The console script beside another package that is called dist_moe too, and with ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_moe

ROOT = Path(__file__).resolve().parents[2]


def run_entry(*path: Path, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the console script's function in a new interpreter that finds packages in `path` first."""
    code = "import sys, dist_moe_entry; sys.argv[0] = 'dist-moe'; dist_moe_entry.main()"
    # -P: the interpreter must not look for packages in the folder where it runs.
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder in which this tree's console script has its installed name."""
    folder = tmp_path / "installed"
    folder.mkdir()
    (folder / "dist_moe_entry").symlink_to(ROOT / "launch" / "entry")
    return folder


def foreign(folder: Path, text: str | None) -> Path:
    """A folder with somebody else's dist_moe in it; without an `__init__.py` if `text` is None."""
    (folder / "foreign" / "dist_moe").mkdir(parents=True)
    if text is not None:
        (folder / "foreign" / "dist_moe" / "__init__.py").write_text(text)
        (folder / "foreign" / "dist_moe" / "cli.py").write_text("def main():\n    print('the wrong program')\n")
    return folder / "foreign"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", "belongs to another distribution"),
        ("DISTRIBUTION = 'dist-moe'", "belongs to another distribution"),
        ("raise RuntimeError('no GPU')", "does not import (RuntimeError: no GPU)"),
    ],
)
def test_another_dist_moe_is_refused_with_its_place_and_a_remedy(
    tmp_path: Path, installed: Path, text: str, value: str
) -> None:
    other = foreign(tmp_path, text)
    done = run_entry(other, installed, arguments=("--help",))
    assert done.returncode == 2 and done.stdout == ""
    assert str(other / "dist_moe" / "__init__.py") in done.stderr and value in done.stderr
    assert "dist-moe-train" in done.stderr and "pip uninstall dist-moe" in done.stderr
    assert "Traceback" not in done.stderr


def test_our_dist_moe_runs_its_command_line(installed: Path) -> None:
    done = run_entry(ROOT, installed, arguments=("--help",))
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout and "train" in done.stdout


def test_python_m_runs_the_same_command_line() -> None:
    argv = [sys.executable, "-m", "dist_moe", "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout and "train" in done.stdout


def test_the_package_names_its_distribution() -> None:
    assert dist_moe.DISTRIBUTION == "dist-moe-train"
