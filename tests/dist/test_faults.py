"""The short form of the fault campaign: a few signals, damages and broken disks, each with the proof that it struck."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.dist.resumable import ROOT, write_text
from tests.faults.job import job
from tests.faults.processes import ProcessFault, inject, plan
from tests.faults.row import WANTED, Row, markdown, missing, read_rows
from tests.selection import slow

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
SHORT = (
    ProcessFault(KILL, "worker", None, inside=True, onward=4, asynchronous=True, seed=20),
    ProcessFault(STOP, "worker", None, inside=False, onward=2, asynchronous=True, seed=40),
    ProcessFault(KILL, "launch", "deepspeed", inside=True, onward=2, asynchronous=False, seed=10),
    ProcessFault(KILL, "worker", "torchrun --max-restarts", inside=False, onward=0, asynchronous=True, seed=30),
)
TRIES = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with job(text, run, 2, None) as running:
        assert running.wait() == [0, 0]
    return run


@pytest.mark.parametrize("fault", [SHORT[0], *map(slow, SHORT[1:])], ids=lambda fault: fault.kind)
def test_the_run_is_as_if_nothing_had_been(text: Path, undisturbed: Path, tmp_path: Path, fault: ProcessFault) -> None:
    """A strike that comes too late for the save is made again at another moment; it has to come in time once."""
    for number in range(TRIES):
        row = inject(fault.of_try(number), text, tmp_path / f"run-{number}", undisturbed)
        assert row.faults == []
        if row.proof:
            return
    pytest.fail(f"{fault.kind} never struck")


@pytest.mark.slow
def test_damaged_files_and_broken_disks_are_held(tmp_path: Path) -> None:
    """One of each kind, in a mount namespace of its own, which needs no root."""
    rows = tmp_path / "rows.jsonl"
    argv = [sys.executable, "-m", "tests.faults", "--group", "file", "--count", "1", "--rows", str(rows)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_rows(rows)
    held = {row.kind for row in found if row.held}
    assert len(held) == 15 and not [row for row in found if row.faults]
    assert sum(row.inside for row in found if row.held) == 3
    assert "one bit flipped" in markdown(found) and "disk gone inside a save" in markdown(found)


def test_a_campaign_without_proof_fails() -> None:
    enough = [Row("process", "k", n, n < 10, "seen", "on") for n in range(40)]
    enough += [Row("file", "f", n, False, "seen", "on") for n in range(200)]
    assert missing(enough) == []
    assert missing(enough[1:]) == ["39 of 40 process faults", "9 of 10 inside a save faults"]
    assert missing(enough[:40], ["process"]) == []
    disks = [Row("file", "d", n, True, "seen", "on") for n in range(200)]
    assert missing([*[replace(row, inside=False) for row in enough[:40]], *disks]) == ["0 of 10 inside a save faults"]
    unproven = [*enough[:-1], Row("file", "f", 7, False, "", "on")]
    assert missing(unproven) == ["199 of 200 file faults"]
    short = [*enough, Row("file", "g", 7, False, "", "on")]
    assert missing(short, kinds=["k", "f"]) == [] and missing(short, kinds=["k", "g"]) == ["no g"]
    wrong = [*enough, Row("file", "f", 8, False, "seen", "on", ["a differs"])]
    assert missing(wrong) == ["f, seed 8: a differs"]


def test_the_plan_is_large_enough() -> None:
    planned = plan(0)
    assert len(planned) >= WANTED["process"] and sum(fault.inside for fault in planned) >= WANTED["inside a save"]
    assert {fault.onward for fault in planned} == {0, 1, 2, 4}
    assert {fault.asynchronous for fault in planned} == {True, False}
