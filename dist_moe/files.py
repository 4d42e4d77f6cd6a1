"""File operations that processes rely on: an exclusive lock, writing a whole file or nothing, and opening no link."""

import contextlib
import errno
import fcntl
import glob
import grp
import logging
import os
import pwd
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from dist_moe.errors import UserError, needs_folder

logger = logging.getLogger(__name__)

# What flock and fcntl answer where a file system (or its mount options) has no locks.
NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK})
HELD = frozenset({errno.EACCES, errno.EAGAIN})
POLL_S = 0.05
# With these, nothing is at a path; with others that is not known.
NOTHING_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP})
NO_MATCH = NOTHING_THERE | {errno.ENAMETOOLONG}
UNSEEN_REMEDY = "give a path whose folders this user may enter, of names that the file system can hold"


class FileLockedError(UserError):
    """Another process holds the lock."""


class UnseenPathError(UserError, OSError):
    """A path that cannot be looked at, where it is not known whether anything is there."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be looked at ({self.strerror}); {UNSEEN_REMEDY}"


def status_of(path: str | Path) -> os.stat_result | None:
    """Return the status of what is at a path, links followed; None if nothing is.

    Raises:
        UnseenPathError: A folder of the path may not be entered, a name is too long, or its file system fails.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in NOTHING_THERE:
            return None
        raise UnseenPathError(error.errno, error.strerror, str(path)) from None


def exists(path: str | Path) -> bool:
    """Whether something is at a path. Raises UnseenPathError, where the method of Path raises any OSError."""
    return status_of(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether a regular file is at a path; as `exists`."""
    status = status_of(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: str | Path) -> bool:
    """Whether a folder is at a path; as `exists`."""
    status = status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, and nothing if there is no folder. Raises UnseenPathError."""
    if not is_folder(folder):
        return []
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UnseenPathError(error.errno, error.strerror, str(folder)) from None


def why_unseen(path: str | Path) -> str:
    """Return why a path cannot be looked at, worded to follow it; "" if it can."""
    try:
        status_of(path)
    except UnseenPathError as error:
        return f"cannot be looked at ({error.strerror})"
    return ""


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock between processes, and make its file and folders where they are missing.

    The kernel releases the lock when the process that holds it ends, in any way. The file itself stays. On a file
    system without flock, a POSIX lock (fcntl) is used, and without that none; the log has one line about either.

    Args:
        path: The lock file. A link is refused, and what a file holds is not changed.
        wait: Whether to wait for another process to release the lock.

    Raises:
        FileLockedError: Another process holds the lock, and `wait` is False.
        OSError: The file cannot be made or opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path))
    # A marker file, filelock's own fallback, would survive a process that is killed.
    lock = FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False, preserve_lock_file=True)
    with contextlib.ExitStack() as stack:
        try:
            lock.acquire()
            stack.callback(lock.release)
        except Timeout:
            raise _locked(path) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            stack.callback(os.close, _posix_lock(path, wait))
        yield


def _posix_lock(path: Path, wait: bool) -> int:
    """Lock a file by fcntl, or warn that nothing can be locked there -> its handle; closing it releases the lock."""
    handle = open_no_link(str(path), os.O_RDWR | os.O_CREAT)
    rule = f"{path.parent} is on a file system without flock"
    try:
        while not _try_posix_lock(handle):
            if not wait:
                raise _locked(path)
            time.sleep(POLL_S)
        _warn_once(f"{rule}; a POSIX lock (fcntl) is used")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            raise
        _warn_once(f"{rule} and without POSIX locks; let no other process write there, or use another folder")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _try_posix_lock(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _locked(path: Path) -> FileLockedError:
    return FileLockedError(f"{path} is locked by another process; wait for it to end, or end it")


def open_no_link(path: str, flags: int) -> int:
    """Open a file unless it is a symbolic link: the `opener` of `open` for files that others might have replaced.

    Opening a pipe without a reader does not block. Raises OSError, also where the path is not a regular file.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return handle


def new_private_file(path: Path, mode: int = 0o600) -> TextIO:
    """Make a file that its owner alone can read, and open it for text. Raises FileExistsError, also for a link."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    return os.fdopen(handle, "w", encoding="utf-8")


def matching_paths(pattern: str) -> tuple[Path, list[Path]]:
    """Find what a path or glob (with `**` too) matches, links to nothing included.

    A part of the path that exists as it is written is not a pattern, even if it contains wildcards.

    Returns:
        The fixed folder of the pattern, and the paths below it.

    Raises:
        OSError: A folder that the pattern looks into cannot be read.
    """
    whole = Path(pattern)
    parts, folder = whole.parts[bool(whole.anchor) :], Path(whole.anchor)
    for index, part in enumerate(parts[:-1]):
        if glob.has_magic(part) and not _exists(folder / part):
            return folder, _matches(folder, parts[index:])
        folder /= part
    last = parts[-1] if parts else "."
    return folder, [folder / last] if _exists(folder / last) else _matches(folder, (last,))


def _exists(path: Path) -> bool:
    """Whether there is something at a path, a link to nothing too. Raises OSError where that cannot be known."""
    try:
        path.lstat()
    except OSError as error:
        if error.errno not in NO_MATCH:
            raise
        return False
    except ValueError:  # a NUL in the path
        return False
    return True


def _matches(folder: Path, parts: Sequence[str]) -> list[Path]:
    """Return what a pattern matches below a folder. Raises OSError for a folder that `glob` would leave out."""
    for index, part in enumerate(parts):
        if index and parts[index - 1] == "**":
            continue  # these folders are already looked at
        read = os.listdir if glob.has_magic(part) else os.lstat
        _require_readable(folder, parts[: index + 1] if part == "**" else parts[:index], read)
    return [folder / name for name in glob.iglob(os.path.join(*parts), root_dir=folder, recursive=True)]


def _require_readable(folder: Path, parts: Sequence[str], read: Callable[[str], object]) -> None:
    """Read each folder that a pattern matches, as `glob` does later. Raises OSError where one is not readable."""
    names = glob.iglob(os.path.join(*parts, ""), root_dir=folder, recursive=True) if parts else [""]
    for name in names:
        try:
            read(os.path.join(folder, name, "."))  # the dot needs the permission to look at files
        except OSError as error:
            if error.errno not in NO_MATCH:
                raise


def others_may_write(folder: Path) -> str:
    """Say who but this user may write to a folder; "" if no other user may. Raises OSError.

    The group of a user alone (its name and members are those of the user) is not another.
    """
    status, own = os.stat(folder), os.geteuid()
    if status.st_uid != own:
        return f"it belongs to {_name_of(status.st_uid)}"
    if status.st_mode & stat.S_IWOTH:
        return "every user may write to it"
    if status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid, own):
        return f"the group {status.st_gid} may write to it"
    return ""


def _is_private_group(group: int, user: int) -> bool:
    try:
        entry, owner = grp.getgrgid(group), pwd.getpwuid(user)
    except KeyError:
        return False
    return owner.pw_gid == group and set(entry.gr_mem) <= {owner.pw_name} and entry.gr_name == owner.pw_name


def _name_of(user: int) -> str:
    try:
        return f"the user {pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"the user {user}"


def try_file(path: Path, option: str) -> None:
    """Raise a UserError if a file cannot be written, before the work whose results it is to hold.

    Args:
        path: The file; it is not made or changed.
        option: The option that names it.
    """
    with needs_folder(path, option, "file"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_atomically(path: Path, text: str, durable: bool = False, mode: int = 0o666) -> None:
    """Write a text file (UTF-8) so that a reader, or a crash, sees either the previous file or the whole new one.

    A link at this path is replaced, not followed.

    Args:
        path: The file; its folders are made where they are missing.
        text: Its new content.
        durable: Whether to return only after the file and its name have reached the disk.
        mode: The permissions of the file, before the umask.

    Raises:
        OSError: The file cannot be written; the previous one is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers of one file from sharing the temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="utf-8", opener=partial(os.open, mode=mode)) as file:
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
