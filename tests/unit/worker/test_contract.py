"""The formats that a launch and its workers agree on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_moe.worker.contract import (
    MAX_MESSAGE_CHARACTERS,
    ErrorReport,
    WorkerRecord,
    WorkerState,
    process_identity,
    read_state,
    record_file,
)


def test_error_report_is_parsed_from_its_text() -> None:
    report = ErrorReport(1234567890.25, 3, 7, "ValueError", "first: a\n\nsecond: é")
    assert ErrorReport.parse(report.to_text("Traceback\n\ncode: 8\n")) == report


def test_error_report_truncates_the_message_at_its_end() -> None:
    report = ErrorReport(0.0, 0, 1, "ValueError", "boom " + "x" * MAX_MESSAGE_CHARACTERS)
    message = ErrorReport.parse(report.to_text("")).message
    assert len(message) == MAX_MESSAGE_CHARACTERS and message.startswith("boom x")


@pytest.mark.parametrize("text", ["", "time: 1\nrank: 0\n", "no report", "time: now\nrank: 0\nmessage: x\n"])
def test_error_report_refuses_other_texts(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        ErrorReport.parse(text)


def test_read_state_reads_what_a_record_says(tmp_path: Path) -> None:
    assert read_state(tmp_path, 2) is None
    path = record_file(tmp_path, 2)
    path.parent.mkdir()
    path.write_text(WorkerRecord(2, 10, 20, WorkerState.STOPPED, 75).to_json())
    assert json.loads(path.read_text()) == {"rank": 2, "pid": 10, "start_time": 20, "state": "stopped", "code": 75}
    assert read_state(tmp_path, 2) == WorkerState.STOPPED


def test_process_identity_is_the_same_for_every_reader_and_another_for_a_later_process() -> None:
    program = f"from dist_moe.worker.contract import process_identity; print(process_identity({os.getpid()}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    own = process_identity(os.getpid())
    assert done.stdout.strip() == own and own.startswith(f"{os.getpid()}:")
    identities = set()
    for _ in range(2):
        time.sleep(0.05)  # more than a clock tick, by which start times differ
        with subprocess.Popen(["sleep", "600"]) as child:
            identities.add(process_identity(child.pid).partition(":")[2])
            child.kill()
    assert len(identities) == 2
