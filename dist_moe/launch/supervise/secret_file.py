"""A file with variables for the workers of one host, for launchers that would put them into an argument list.

DeepSpeed's runners write every variable into the command lines of pdsh, ssh and mpirun. So they get the path of a file
instead, which this module keeps on each host as long as its stdin is open: a launch starts it by ssh, and sends the
content over stdin.
"""

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_moe.errors import UserError, reason_of
from dist_moe.files import new_private_file
from dist_moe.launch.supervise.remote_exec import READ_BYTES, read_variables
from dist_moe.worker.contract import LAUNCH_FILE_VARIABLE, LAUNCH_VARIABLE

SCHEME = "file:"
READY = b"ready\n"


@contextlib.contextmanager
def kept_on_hosts(commands: Sequence[Sequence[str]], variables: Mapping[str, str]) -> Iterator[None]:
    """Keep the variables in a file on each host, for the length of the context.

    Args:
        commands: For each host, the command that runs this module there.
        variables: What the file holds.

    Raises:
        UserError: A host does not take it.
    """
    holders: list[subprocess.Popen[bytes]] = []
    line = json.dumps(dict(variables)).encode() + b"\n"
    try:
        for command in commands:
            holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
            )
            holders.append(holder)
            assert holder.stdin is not None
            with contextlib.suppress(OSError):
                holder.stdin.write(line)
        for command, holder in zip(commands, holders, strict=True):
            assert holder.stdout is not None
            if holder.stdout.readline() != READY:
                raise UserError(f"{command[-3]} cannot keep the variables of its workers; see its message above")
        yield
    finally:
        for holder in holders:
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdin.close()
            holder.stdout.close()
            holder.wait()


def file_here(path: Path) -> Path:
    """Return the file of this host, which may share the folder with others."""
    return path.with_name(f"{path.name}-{socket.gethostname()}")


def keep(path: Path) -> None:
    """Write the variables that come first on stdin to a file for this user alone; remove it when stdin is closed."""
    text, path = json.dumps(read_variables()), file_here(path)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    folder = path.parent.lstat()
    if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != os.geteuid() or folder.st_mode & 0o077:
        sys.exit(f"{path.parent} is not a folder of this user alone; remove it")
    try:
        with new_private_file(path) as file:
            file.write(text)
        os.write(sys.stdout.fileno(), READY)
        while os.read(sys.stdin.fileno(), READ_BYTES):
            pass
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another host still uses it
            path.parent.rmdir()


def restart_with_variables(environment: Mapping[str, str]) -> None:
    """Run this process anew with the variables of the file that DIST_MOE_LAUNCH names; return where it names none.

    Some variables are read when a process starts (LD_LIBRARY_PATH).

    Raises:
        UserError: The file cannot be read.
    """
    launch = environment.get(LAUNCH_VARIABLE, "")
    if not launch.startswith(SCHEME):
        return
    try:
        variables: dict[str, Any] = json.loads(file_here(Path(launch.removeprefix(SCHEME))).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{LAUNCH_VARIABLE}={launch} cannot be read ({reason_of(error)}); start the job again by `dist-moe launch`"
        ) from None
    own = {**environment, **variables, LAUNCH_FILE_VARIABLE: launch}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], own)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
