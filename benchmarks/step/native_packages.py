"""The newest transformers in a folder of its own below build/, beside the environment of the project."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.step.session import CannotRun

FOLDER = ROOT / "build" / "benchmarks" / "transformers"
INSTALL_LIMIT_S = 300.0


def install_transformers(folder: Path = FOLDER) -> Path:
    """Install the newest transformers and accelerate, and return the folder for PYTHONPATH; once for a checkout.

    torch stays that of the project: transformers does not require it, and accelerate is installed without what it
    requires.

    Raises:
        CannotRun: pip cannot install it.
    """
    done = folder / ".installed"
    if done.is_file():
        return folder
    for packages in (("transformers",), ("--no-deps", "accelerate")):
        argv = (sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder), *packages)
        run_pip(argv)
    done.touch()
    return folder


def native_version(folder: Path = FOLDER) -> str:
    """Return the version of the installed transformers, "" where none is installed."""
    found = sorted(folder.glob("transformers-*.dist-info"))
    return found[-1].name.split("-")[1].removesuffix(".dist") if found else ""


def run_pip(argv: Sequence[str]) -> None:
    """Run pip.

    Raises:
        CannotRun: It fails, or takes longer than INSTALL_LIMIT_S.
    """
    try:
        result = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotRun(f"the newest transformers cannot be installed: {error}") from error
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise CannotRun(f"the newest transformers cannot be installed: {reason}")
