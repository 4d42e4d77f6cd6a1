"""The short form of the fault campaign: a few signals, damaged files and broken disks, each with evidence."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.dist.resumable import ROOT, write_text
from tests.faults.encoder import encoder_run
from tests.faults.job import job
from tests.faults.processes import ProcessFault, inject, plan
from tests.faults.row import REQUIRED, Row, markdown, missing, read_rows
from tests.selection import only_first

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
SHORT = (
    ProcessFault(KILL, "worker", None, during_save=True, resumed_workers=4, asynchronous=True, seed=20),
    ProcessFault(STOP, "worker", None, during_save=False, resumed_workers=2, asynchronous=True, seed=40),
    ProcessFault(KILL, "launch", "deepspeed", during_save=True, resumed_workers=2, asynchronous=False, seed=10),
    ProcessFault(
        KILL, "worker", "torchrun --max-restarts", during_save=False, resumed_workers=0, asynchronous=True, seed=30
    ),
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


@pytest.mark.slow
@pytest.mark.parametrize("fault", only_first(SHORT, 2), ids=lambda fault: fault.kind)
def test_a_run_with_a_process_fault_equals_the_undisturbed_run(
    text: Path, undisturbed: Path, tmp_path: Path, fault: ProcessFault
) -> None:
    """A signal that comes too late for the save is sent again at another moment; it must be in time once."""
    for number in range(TRIES):
        row = inject(fault.of_try(number), text, tmp_path / f"run-{number}", undisturbed)
        assert row.failures == []
        if row.evidence:
            return
    pytest.fail(f"{fault.kind} never took effect")


@pytest.mark.slow
def test_an_upcycled_encoder_that_classifies_survives_a_kill_in_a_save(tmp_path: Path) -> None:
    """Balanced by a rule with memory, whose state is in the checkpoint too."""
    examples, changes = encoder_run(tmp_path)
    with job(examples, tmp_path / "undisturbed", 2, None, *changes) as running:
        assert running.wait() == [0, 0]
    fault = ProcessFault(KILL, "worker", None, during_save=True, resumed_workers=2, asynchronous=True, seed=50)
    for number in range(TRIES):
        row = inject(fault.of_try(number), examples, tmp_path / f"run-{number}", tmp_path / "undisturbed", changes)
        assert row.failures == []
        if row.evidence:
            return
    pytest.fail(f"{fault.kind} never took effect")


@pytest.mark.slow
def test_damaged_files_and_broken_disks_are_survived(tmp_path: Path) -> None:
    """One of each kind, in a new mount namespace, which does not require root."""
    rows = tmp_path / "rows.jsonl"
    argv = [sys.executable, "-m", "tests.faults", "--group", "file", "--count", "1", "--rows", str(rows)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_rows(rows)
    survived = {row.kind for row in found if row.survived}
    assert len(survived) == 15 and not [row for row in found if row.failures]
    assert sum(row.during_save for row in found if row.survived) == 3
    assert "one bit flipped" in markdown(found) and "disk unmounted during a save" in markdown(found)


def test_a_campaign_without_evidence_fails() -> None:
    enough = [Row("process", "k", n, n < 10, "seen", "on") for n in range(40)]
    enough += [Row("file", "f", n, False, "seen", "on") for n in range(200)]
    assert missing(enough) == []
    assert missing(enough[1:]) == ["39 of 40 process faults", "9 of 10 during a save faults"]
    assert missing(enough[:40], ["process"]) == []
    disks = [Row("file", "d", n, True, "seen", "on") for n in range(200)]
    assert missing([*[replace(row, during_save=False) for row in enough[:40]], *disks]) == [
        "0 of 10 during a save faults"
    ]
    unproven = [*enough[:-1], Row("file", "f", 7, False, "", "on")]
    assert missing(unproven) == ["199 of 200 file faults"]
    short = [*enough, Row("file", "g", 7, False, "", "on")]
    assert missing(short, kinds=["k", "f"]) == [] and missing(short, kinds=["k", "g"]) == ["no g"]
    wrong = [*enough, Row("file", "f", 8, False, "seen", "on", ["a differs"])]
    assert missing(wrong) == ["f, seed 8: a differs"]


def test_the_plan_is_large_enough() -> None:
    planned = plan(0)
    assert (
        len(planned) >= REQUIRED["process"] and sum(fault.during_save for fault in planned) >= REQUIRED["during a save"]
    )
    assert {fault.resumed_workers for fault in planned} == {0, 1, 2, 4}
    assert {fault.asynchronous for fault in planned} == {True, False}
