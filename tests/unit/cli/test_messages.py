"""Control codes reach terminals alone, whatever the environment asks for."""

import os
import subprocess
import sys
from typing import TextIO, cast

import pytest

from dist_moe.cli.messages import set_up_terminal
from tests.mpi.mpirun import ROOT, mpirun

FORCED = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "PY_COLORS": "1", "TTY_COMPATIBLE": "1"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "0"}
PLAIN = {"_TYPER_FORCE_DISABLE_TERMINAL": "1"}


class Stream:
    """A standard stream that is a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("before", "stdout", "stderr", "after"),
    [
        (FORCED, True, True, FORCED),
        (FORCED, False, False, PLAIN),
        (FORCED, False, True, PLAIN),
        (FORCED, True, False, {}),
        ({"NO_COLOR": "1", "TERM": "xterm"}, False, False, {"NO_COLOR": "1", "TERM": "xterm"} | PLAIN),
        ({"TTY_COMPATIBLE": "0"}, False, False, {"TTY_COMPATIBLE": "0"} | PLAIN),
        # OpenMPI's terminal is not the user's; that of an agent is.
        (OPENMPI | FORCED, True, True, OPENMPI | PLAIN | {"TTY_COMPATIBLE": "0"}),
        (OPENMPI | {"DIST_MOE_TERMINAL": "24x80"}, True, True, OPENMPI | {"DIST_MOE_TERMINAL": "24x80"}),
    ],
)
def test_set_up_terminal(before: dict[str, str], stdout: bool, stderr: bool, after: dict[str, str]) -> None:
    environment = dict(before)
    set_up_terminal(environment, cast(TextIO, Stream(stdout)), cast(TextIO, Stream(stderr)))
    assert environment == after


def test_no_control_codes_in_a_file_though_colors_are_forced() -> None:
    argv = [sys.executable, "-m", "dist_moe", "--help"]
    environment = os.environ | FORCED | {"GITHUB_ACTIONS": "1", "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "Usage" in done.stdout and "\x1b" not in done.stdout + done.stderr


def test_no_control_codes_below_an_mpirun_whose_output_is_a_file() -> None:
    done = mpirun(1, ["-m", "dist_moe", "--help"], FORCE_COLOR="1", TERM="xterm-256color")
    assert "Usage" in done.stdout and "\x1b" not in done.stdout + done.stderr
