"""A test that hangs in C costs itself: the tests after it run, and nothing that it has started is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.selection import full

ROOT = Path(__file__).resolve().parents[2]
HANGING = """
import ctypes, subprocess, pathlib

def test_before():
    pass

def test_hangs():
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    pathlib.Path("child").write_text(str(child.pid))
    library = ctypes.{library}(None)
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # never returns, and no signal interrupts it

def test_after():
    pass
"""
WAITING = "import time\n\ndef test_waits():\n    time.sleep(600)\n\ndef test_after_it():\n    pass\n"
SETTINGS = "[pytest]\ntimeout = 2\nfaulthandler_timeout = 4\nfaulthandler_exit_on_timeout = true\n"


@pytest.mark.parametrize(("library", "processes"), [("PyDLL", 2), full("CDLL", 1)])
@pytest.mark.slow
def test_a_hang_in_c_costs_its_test_alone(tmp_path: Path, library: str, processes: int) -> None:
    """PyDLL keeps the GIL, so that no thread of Python could end the process."""
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "test_hanging.py").write_text(HANGING.format(library=library))
    (tmp_path / "test_waiting.py").write_text(WAITING)
    argv = [sys.executable, "-m", "pytest", "-p", "tests.crash", "-p", "no:cacheprovider", "-v", "-rA"]
    argv += ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 3 passed" in done.stdout, done.stdout
    assert "crashed while running 'test_hanging.py::test_hangs'" in done.stdout
    assert "Timeout (>2.0s) from pytest-timeout" in done.stdout
    assert "in test_hangs" in done.stderr, "the stack of the hang is shown"
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}")
    deadline_s = time.monotonic() + 10
    while child.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not child.exists()
