"""The lock between processes, and files that are written whole or not at all."""

import ast
import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.files import FileLockedError, file_lock, open_no_link, others_may_write, write_atomically
from tests.unit.source import Source, sources

HOLDER = """if True:
    import sys
    from pathlib import Path
    from dist_moe.files import file_lock
    with file_lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""
OTHER = """if True:
    import fcntl, sys
    try:
        fcntl.lockf(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(3)
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


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("content")
    (tmp_path / "launch.lock").symlink_to(target)
    with pytest.raises(OSError, match="it is a link, which is not followed"), file_lock(tmp_path / "launch.lock"):
        pass
    assert target.read_text() == "content"
    with file_lock(target):
        pass
    assert target.read_text() == "content"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
@pytest.mark.parametrize("posix", [True, False])
def test_without_flock_another_lock_is_taken_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, posix: bool
) -> None:
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    if not posix:
        monkeypatch.setattr(fcntl, "lockf", unsupported)
    with caplog.at_level(logging.WARNING):
        for name in ("a.lock", "b.lock"):
            with file_lock(tmp_path / name):
                # A POSIX lock is one of the process, so that only another process is refused.
                command = [sys.executable, "-c", OTHER, str(tmp_path / name)]
                assert subprocess.run(command, check=False).returncode == (3 if posix else 0)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{tmp_path} is on a file system without flock")
    assert ("a POSIX lock (fcntl) is used" in message) == posix


def test_neither_a_link_nor_a_pipe_is_opened(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError), open(tmp_path / name, "a", opener=open_no_link):
            pass
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "content"
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "new"


def test_folders_that_others_may_write_are_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert others_may_write(tmp_path) == ""
    tmp_path.chmod(0o777)
    assert others_may_write(tmp_path) == "every user may write to it"
    if os.geteuid() == 0:
        tmp_path.chmod(0o770)
        os.chown(tmp_path, 0, 1)
        assert others_may_write(tmp_path) == "the group 1 may write to it"
        os.chown(tmp_path, 65534, 0)
        assert "belongs to the user" in others_may_write(tmp_path)


def test_every_file_is_opened_for_writing_without_following_a_link() -> None:
    """By `write_atomically`, by `open_no_link`, by `new_private_file`, or as a new file."""
    found = [f"{source.path}:{line}" for source in sources("dist_moe") for line in _followed(source)]
    assert found == []


def _followed(source: Source) -> Iterator[int]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("write_text", "write_bytes") or (name == "touch" and words.get("exist_ok") != "False"):
            yield node.lineno
        modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        writes = any(set(mode) & set("wa+") and set(mode) <= set("rwabt+") for mode in modes)
        if name == "open" and writes and words.get("opener") != "open_no_link":
            yield node.lineno
