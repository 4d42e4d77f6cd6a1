"""Ctrl-C in a run without a launch: the first one asks for a checkpoint, the second one ends the process."""

import signal
import subprocess
import sys
from pathlib import Path

LIMIT_S = 60.0
RUN = """
import sys, time
from dist_moe.health.stop_signals import stop_requests
from dist_moe.worker.exit import Stopped, report_failure
with report_failure(sys.argv[1], 0), stop_requests() as requested:
    print("training", flush=True)
    while not requested:
        time.sleep(0.01)
    print("asked", [each.name for each in requested], flush=True)
    if sys.argv[2] == "save":
        raise Stopped
    time.sleep(600)
"""


def run(tmp_path: Path, act: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), act], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked ['SIGINT']\n"
    return process


def test_the_first_ctrl_c_asks_for_a_checkpoint(tmp_path: Path) -> None:
    process = run(tmp_path, "save")
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (
        75,
        "Ctrl-C: the run finishes its step, saves a checkpoint and stops; Ctrl-C again ends it at once\n",
    )


def test_the_second_ctrl_c_ends_the_process(tmp_path: Path) -> None:
    process = run(tmp_path, "wait")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
