"""File operations that processes rely on: an exclusive lock, and writing a whole file or nothing."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dist_moe.errors import UserError


class FileLockedError(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock between processes, and make its file and folders where they are missing.

    The kernel releases the lock when the process that holds it ends, in any way. The file itself stays.

    Args:
        path: the lock file.
        wait: whether to wait for another process to release the lock.

    Raises:
        FileLockedError: another process holds the lock, and `wait` is False.
        OSError: the file cannot be made or opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A marker file, the fallback without flock, would survive a process that is killed.
    lock = FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire()
    except Timeout:
        raise FileLockedError(f"{path} is locked by another process; wait for it to end, or end it") from None
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, text: str, durable: bool = False) -> None:
    """Write a text file (UTF-8) so that a reader, or a crash, sees either the previous file or the whole new one.

    Args:
        path: the file; its folders are made where they are missing.
        text: its new content.
        durable: whether to return only after the file and its name have reached the disk.

    Raises:
        OSError: the file cannot be written; the previous one is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers of one file from sharing the temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder have reached the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
