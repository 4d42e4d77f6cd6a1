"""Lines on disks that get full, read-only or lost while a run writes them, with a real tmpfs for each."""

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
file.begin()
def write(*steps, padding=0):
    for step in steps:
        file.write(json.dumps({"step": step, "text": "x" * padding}))
def steps():
    return [json.loads(line)["step"] for line in file.path.read_text().splitlines()]
"""
CLOSING = "\nprint(json.dumps({'warned': warned, 'steps': steps()}))"


def written(disk: Path, body: str) -> dict:
    return json.loads(run_on_disk(disk, "256k", OPENING + body + CLOSING))


def test_a_full_disk_costs_the_lines_that_it_has_no_room_for(tmp_path: Path) -> None:
    """The line that it took a part of is no part of the file afterwards."""
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
        f"{path} cannot be written (No space left on device); training goes on without it",
        f"{path} is written again; 2 lines are lost",
        f"{path} cannot be written (No space left on device); training goes on without it",
        f"{path} is written again; 1 lines are lost",
    ]


def test_a_read_only_disk_costs_the_lines_of_that_time(tmp_path: Path) -> None:
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
    assert "Read-only file system" in found["warned"][0] and "2 lines are lost" in found["warned"][1]


@pytest.mark.parametrize("how", ["detach(disk)", "(disk / 'run').rename(disk / 'moved')"])
def test_a_file_that_vanished_is_begun_anew(tmp_path: Path, how: str) -> None:
    found = written(tmp_path, f"write(1)\n{how}\nwrite(2, 3)\n")
    assert found["steps"] == [2, 3]
    assert found["warned"] == [f"{tmp_path}/run/metrics.jsonl was gone, and is begun anew"]


def test_a_recorder_on_a_read_only_disk_says_which_folder_and_what_to_do(tmp_path: Path) -> None:
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
    told = run_on_disk(tmp_path, "256k", program)
    assert told.startswith(f"run.dir={tmp_path}/run cannot be written (Read-only file system: ")
    assert "name a folder on a disk that has room and may be written" in told


def test_a_file_in_the_place_of_the_folder_is_told_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match=r"run\.dir=.*run cannot be written \(File exists: "):
        RunRecorder(tmp_path / "run").__enter__()


def test_what_stands_on_the_terminal_is_not_worth_the_run() -> None:
    program = """
import sys
from dist_moe.observe.console import RunConsole
with RunConsole(2) as console:
    sys.stdout.reconfigure(line_buffering=True)
    for number in range(1000):
        console.say("a line " * 20)
    console.complain("a warning")
sys.stderr.write("went on")
"""
    argv = [sys.executable, "-c", program]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    assert done.stderr.startswith("went on"), done.stderr


def test_curves_go_on_in_another_file_after_a_full_disk(tmp_path: Path) -> None:
    program = """
import sys, threading
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from dist_moe.observe.tensorboard import TensorBoardWriter
from tests.disk import fill
disk, warned = Path(sys.argv[1]), []
threading.excepthook = lambda _: None  # the thread of TensorBoard's writer ends by its error
with TensorBoardWriter(disk / "tensorboard", warn=warned.append) as board:
    board.checkpoint(1, {"stall_ms": 1.0})
    board._writer.flush()
    ballast = fill(disk, 0)
    for step in range(2, 2000):
        board.checkpoint(step, {f"time {number}": 1.0 for number in range(40)})
        if warned:
            break
        board._write(board._writer.flush)
    for step in range(2000, 2003):
        board.checkpoint(step, {"stall_ms": 2.0})
    ballast.unlink()
    board.checkpoint(3000, {"stall_ms": 3.0})
steps = []
for path in sorted((disk / "tensorboard").iterdir()):
    found = EventAccumulator(str(path)).Reload()
    tags = found.Tags()["scalars"]
    steps += [event.step for event in found.Scalars("checkpoint/stall_ms")] if "checkpoint/stall_ms" in tags else []
assert steps == [1, 3000], steps
assert len(list((disk / "tensorboard").iterdir())) == 2
print(*warned, sep="\\n")
"""
    told = run_on_disk(tmp_path, "512k", program).splitlines()
    assert told == [
        f"{tmp_path}/tensorboard cannot be written (No space left on device); training goes on without it",
        f"{tmp_path}/tensorboard is written again; its curves have a gap",
    ]
