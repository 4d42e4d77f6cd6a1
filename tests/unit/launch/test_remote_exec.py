"""Commands that end when their stdin closes, as those that a launch starts by ssh: real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

LIMIT_S = 30.0
DETACH = """
import subprocess, sys, time
from pathlib import Path
detached = subprocess.Popen(["sleep", "600"], start_new_session=True)
Path(sys.argv[1]).write_text(str(detached.pid))
"""


def start(*argv: str) -> subprocess.Popen[bytes]:
    """Start a command below `remote_exec`, with stdin open."""
    module = [sys.executable, "-m", "dist_moe.launch.supervise.remote_exec"]
    process = subprocess.Popen([*module, *argv], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b'{"SENT": "over stdin"}\n')
    process.stdin.flush()
    return process


def read_pid(path: Path) -> int:
    """The process id that a command writes to a file."""
    deadline = time.monotonic() + LIMIT_S
    while not path.is_file() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(path.read_text())


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its adoptive parent to ask for its status."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 128 + signal.SIGKILL)])
def test_the_exit_code_is_that_of_the_command(command: str, code: int) -> None:
    with start("sh", "-c", command) as process:
        assert process.wait(LIMIT_S) == code


@pytest.mark.parametrize("deaf", [False, True])
def test_everything_ends_when_stdin_closes(tmp_path: Path, deaf: bool) -> None:
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" if deaf else ""
    with start(sys.executable, "-c", f"{ignore}\n{DETACH}\ntime.sleep(600)", str(tmp_path / "pid")) as process:
        pid = read_pid(tmp_path / "pid")
        assert process.poll() is None
        assert process.stdin
        process.stdin.close()
        assert process.wait(LIMIT_S) == 128 + (signal.SIGKILL if deaf else signal.SIGTERM)
    assert has_ended(pid)


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    with start(sys.executable, "-c", DETACH, str(tmp_path / "pid")) as process:
        assert process.wait(LIMIT_S) == 0
    assert has_ended(read_pid(tmp_path / "pid"))
