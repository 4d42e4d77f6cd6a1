"""A file with variables for the workers of one host, for launchers that would put them into an argument list.

DeepSpeed's runners write every variable into the command lines of pdsh, ssh and mpirun. So they get the path of a file
instead, which this module keeps on each host as long as its stdin is open: a launch starts it by ssh, and sends the
content over stdin.
"""

import contextlib
import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_moe.errors import UserError, reason_of
from dist_moe.files import new_private_file
from dist_moe.launch.supervise.protocol import wait_readable
from dist_moe.launch.supervise.remote_exec import READ_BYTES, pipe_size, read_variables, send_line, variables_line
from dist_moe.worker.contract import LAUNCH_FILE_VARIABLE, LAUNCH_VARIABLE

SCHEME = "file:"
READY = b"ready\n"
READY_LIMIT_S = 30.0
END_LIMIT_S = 3.0
POLL_S = 0.1


@contextlib.contextmanager
def kept_on_hosts(
    commands: Mapping[str, Sequence[str]],
    variables: Mapping[str, str],
    interrupted: Callable[[], bool] = lambda: False,
    ends_by: Callable[[], float] = lambda: math.inf,
) -> Iterator[None]:
    """Keep the variables in a file on each host, for the length of the context.

    Args:
        commands: For each host, by its name, the command that runs this module there.
        variables: What the file holds.
        interrupted: Whether to stop waiting for hosts; the block is entered then, and may find no file there.
        ends_by: When the end of the context must no longer wait, in seconds of the monotonic clock.

    Raises:
        UserError: A host does not take it.
    """
    holders: dict[str, subprocess.Popen[bytes]] = {}
    line = variables_line(variables)
    try:
        for host, command in commands.items():
            holders[host] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
                pipesize=pipe_size(line),
            )
            send_line(holders[host], line)
        _wait_until_ready(holders, interrupted)
        yield
    finally:
        _end(holders.values(), ends_by)


def _wait_until_ready(holders: Mapping[str, subprocess.Popen[bytes]], interrupted: Callable[[], bool]) -> None:
    """Return once each host has its file, or a signal has arrived.

    Raises:
        UserError: A host does not say so.
    """
    waiting = {holder.stdout: host for host, holder in holders.items()}
    answers = dict.fromkeys(holders, b"")
    deadline = time.monotonic() + READY_LIMIT_S
    while waiting and not interrupted():
        if time.monotonic() > deadline:
            raise UserError(
                f"{', '.join(waiting.values())} did not keep the variables of its workers within {READY_LIMIT_S:g} s; "
                "check that ssh reaches it and that Python starts there"
            )
        for output in wait_readable(list(waiting), POLL_S):
            host = waiting[output]
            part = os.read(output.fileno(), READ_BYTES)
            answers[host] += part
            if not (part and READY.startswith(answers[host])):
                raise UserError(f"{host} cannot keep the variables of its workers; see its message above")
            if answers[host] == READY:
                del waiting[output]


def _end(holders: Iterable[subprocess.Popen[bytes]], ends_by: Callable[[], float]) -> None:
    """Close the stdin of each holder, which then removes its file, and kill those that do not end in time."""
    for holder in holders:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.close()
        holder.stdout.close()
    deadline = time.monotonic() + END_LIMIT_S
    while any([holder.poll() is None for holder in holders]) and time.monotonic() < min(deadline, ends_by()):
        time.sleep(POLL_S / 5)
    for holder in holders:
        if holder.poll() is None:
            # With what an ssh has started, as its ProxyCommand: each holder has a session of its own.
            os.killpg(holder.pid, signal.SIGKILL)
            holder.wait()


def file_here(path: Path) -> Path:
    """Return the file of this host, which may share the folder with others."""
    return path.with_name(f"{path.name}-{socket.gethostname()}")


def keep(path: Path) -> None:
    """Write the variables that come first on stdin to a file for this user alone; remove it when stdin is closed."""
    text, path = json.dumps(read_variables()), file_here(path)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        folder = path.parent.lstat()
        if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != os.geteuid() or folder.st_mode & 0o077:
            sys.exit(f"{path.parent} is not a folder of this user alone; remove it")
        file = new_private_file(path)
    except OSError as error:
        sys.exit(f"{path} cannot be made ({error.strerror}); free the path, or make /tmp a folder to write to")
    try:
        with file:
            file.write(text)
        os.write(sys.stdout.fileno(), READY)
        while os.read(sys.stdin.fileno(), READ_BYTES):
            pass
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another host still uses it
            path.parent.rmdir()


def restart_with_variables(environment: Mapping[str, str]) -> None:
    """Restart this process with the variables of the file that DIST_MOE_LAUNCH names; return if it names none.

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
