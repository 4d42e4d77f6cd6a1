"""Tests of lines on disks that become full, read-only or lost while a run writes them, each on a real tmpfs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.errors import RunFolderError
from dist_moe.observe.record import RunRecorder
from tests.disk import ROOT, run_on_disk

OPENING = """
import json, sys
from pathlib import Path
from dist_moe.observe.jsonl import LineFile
from tests.disk import detach, fill, set_read_only
disk, warned = Path(sys.argv[1]), []
file = LineFile(disk / "run/metrics.jsonl", warned.append)
file.create()
def write(*steps, padding=0):
    for step in steps:
        file.write(json.dumps({"step": step, "text": "x" * padding}))
def steps():
    return [json.loads(line)["step"] for line in file.path.read_text().splitlines()]
"""
CLOSING = "\nprint(json.dumps({'warned': warned, 'steps': steps()}))"


def written(disk: Path, body: str) -> dict:
    return json.loads(run_on_disk(disk, "256k", OPENING + body + CLOSING))


def test_a_full_disk_loses_only_the_lines_that_do_not_fit(tmp_path: Path) -> None:
    """The part of the line that still fit is removed afterwards."""
    found = written(
        tmp_path,
        """
write(1)
ballast = fill(disk, 0)
write(2, 3, padding=6000)
assert file.path.stat().st_size == 4096, "a part of line 2"
ballast.unlink()
write(4, 5)
fill(disk, 0)
write(6, padding=9000)
(disk / "ballast").unlink()
write(7)
""",
    )
    assert found["steps"] == [1, 4, 5, 7]
    path = tmp_path / "run/metrics.jsonl"
    assert found["warned"] == [
        f"cannot write {path} (No space left on device); training continues, and its lines are lost",
        f"{path} can be written again; 2 lines lost",
        f"cannot write {path} (No space left on device); training continues, and its lines are lost",
        f"{path} can be written again; 1 line lost",
    ]


def test_a_read_only_disk_loses_the_lines_of_that_time(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        """
write(1)
assert set_read_only(disk, True)
write(2, 3)
assert set_read_only(disk, False)
write(4)
""",
    )
    assert found["steps"] == [1, 4]
    assert "Read-only file system" in found["warned"][0] and "2 lines lost" in found["warned"][1]


@pytest.mark.parametrize("how", ["detach(disk)", "(disk / 'run').rename(disk / 'moved')"])
def test_a_removed_file_is_created_again(tmp_path: Path, how: str) -> None:
    found = written(tmp_path, f"write(1)\n{how}\nwrite(2, 3)\n")
    assert found["steps"] == [2, 3]
    assert found["warned"] == [f"{tmp_path}/run/metrics.jsonl was removed, and has been created again"]


def test_a_recorder_on_a_read_only_disk_names_the_folder_and_the_remedy(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from dist_moe.errors import RunFolderError
from dist_moe.observe.record import RunRecorder
from tests.disk import set_read_only
disk = Path(sys.argv[1])
assert set_read_only(disk, True)
try:
    RunRecorder(disk / "run").__enter__()
except RunFolderError as error:
    print(error)
"""
    output = run_on_disk(tmp_path, "256k", program)
    assert output.startswith(f"run.dir={tmp_path}/run cannot be written (Read-only file system: ")
    assert "set run.dir to a folder on a disk with free space and write permission" in output


def test_a_file_in_place_of_the_folder_is_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match=r"run\.dir=.*run cannot be written \(File exists: "):
        RunRecorder(tmp_path / "run").__enter__()


def test_a_full_disk_behind_standard_output_does_not_end_the_run() -> None:
    program = """
import sys
from dist_moe.observe.console import RunConsole
with RunConsole(2) as console:
    sys.stdout.reconfigure(line_buffering=True)
    for number in range(1000):
        console.log("a line " * 20)
    console.warn("a warning")
sys.stderr.write("continued")
"""
    argv = [sys.executable, "-c", program]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    assert done.stderr.startswith("continued"), done.stderr


def test_curves_continue_in_a_new_event_file_after_a_full_disk(tmp_path: Path) -> None:
    program = """
import sys, threading
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from dist_moe.observe.tensorboard import TensorBoardWriter
from tests.disk import fill
from tests.unit.observe.samples import step_sample
disk, warned = Path(sys.argv[1]), []
threading.excepthook = lambda _: None  # the thread of the SummaryWriter ends by its error
with TensorBoardWriter(disk / "tensorboard", warn=warned.append) as board:
    board.checkpoint(1, 1.0)
    board._writer("").flush()
    ballast = fill(disk, 0)
    for step in range(2, 2000):
        board.step(step_sample(step=step))
        if warned:
            break
        board._write(lambda: board._writer("").flush())
    for step in range(2000, 2003):
        board.checkpoint(step, 2.0)
    ballast.unlink()
    board.checkpoint(3000, 3.0)
steps, tag = [], "3_details/checkpoint_stall_ms"
files = sorted(path for path in (disk / "tensorboard").iterdir() if path.is_file())
for path in files:
    found = EventAccumulator(str(path)).Reload()
    tags = found.Tags()["scalars"]
    steps += [event.step for event in found.Scalars(tag)] if tag in tags else []
assert steps == [1, 3000], steps
assert len(files) == 2
print(*warned, sep="\\n")
"""
    output = run_on_disk(tmp_path, "512k", program).splitlines()
    assert output == [
        f"cannot write {tmp_path}/tensorboard (No space left on device); training continues, and its curves have a gap",
        f"{tmp_path}/tensorboard can be written again",
    ]
