"""Copies the tree, runs its tests there, and tries mutants on the copy."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.catalogue import Mutant

PASSED, FAILED = 0, 1
"""Pytest's exit codes for tests that ran; any other means that they did not."""
OVER_TIME = -1


@dataclass(frozen=True)
class Run:
    """The end of a pytest run: its exit code (OVER_TIME if it was ended), its time, and what it printed."""

    code: int
    seconds: float
    output: str


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant; `outcome` says it in words, `output` is what pytest printed."""

    mutant: Mutant
    caught: bool
    outcome: str
    seconds: float
    output: str


def copy_tree(root: Path, target: Path) -> None:
    """Copy the files that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listing.stdout.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_tests(folder: Path, tests: list[str], limit_s: float) -> Run:
    """Run pytest on the tree in `folder`, which comes before what is installed; end it after `limit_s`."""
    # Without .pyc files, a change within a second of the last one cannot be overlooked.
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    started_s = time.monotonic()
    with subprocess.Popen(
        argv, cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit_s)
            code = process.returncode
        except subprocess.TimeoutExpired:
            _end_session(process)
            output, _ = process.communicate()
            code = OVER_TIME
        except BaseException:
            _end_session(process)
            raise
    return Run(code, time.monotonic() - started_s, output)


def try_mutant(folder: Path, mutant: Mutant, limit_s: float) -> Verdict:
    """Change the copy, run the mutant's test, and put the file back."""
    path = folder / mutant.file
    original = path.read_text()
    path.write_text(mutant.apply(original))
    try:
        run = run_tests(folder, [mutant.test], limit_s)
    finally:
        path.write_text(original)
    outcomes = {
        FAILED: "caught",
        PASSED: "SURVIVED",
        OVER_TIME: f"caught (no end within {limit_s:.0f} s)",
    }
    outcome = outcomes.get(run.code, f"BROKEN: the test did not run (pytest's exit code {run.code})")
    if run.code == FAILED and re.search(r"^E +(NameError|ImportError|ModuleNotFoundError)\b", run.output, re.MULTILINE):
        return Verdict(mutant, False, "BROKEN: the mutant names what is not there", run.seconds, run.output)
    return Verdict(mutant, run.code in (FAILED, OVER_TIME), outcome, run.seconds, run.output)


def _end_session(process: subprocess.Popen[str]) -> None:
    """Kill pytest and the workers that it started; they share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
