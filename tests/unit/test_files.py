"""The lock between processes, and files that are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.files import FileLockedError, file_lock, write_atomically

HOLDER = """if True:
    import sys
    from pathlib import Path
    from dist_moe.files import file_lock
    with file_lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_lock_is_exclusive_until_its_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(FileLockedError, match=r"a\.lock is locked by another process; wait"),
            file_lock(path, wait=False),
        ):
            pass
        holder.kill()
        holder.wait()
    with file_lock(path, wait=False):
        assert path.exists()
    with file_lock(path):
        pass


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), file_lock(tmp_path / "a.lock"):
        raise KeyError
    with file_lock(tmp_path / "a.lock", wait=False):
        pass


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "a.json"
    for text in ("first é", ""):
        write_atomically(path, text, durable)
        assert path.read_bytes() == text.encode()
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failed_write_leaves_the_previous_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "before")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "after", durable=True)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.json"]
