"""Runs a command on another host for as long as the launch that started it by ssh holds its input open.

An ssh server lets a command run on when its connection ends. A launcher may then wait for minutes for hosts that it
will not meet; its workers, had it started any, would be ended by their minders.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from dist_moe.launch.supervise.process_tree import adopting_orphans, descendants, send

GRACE_S = 3.0
LOOK_S = 0.1


def hold(argv: Sequence[str]) -> int:
    """Run `argv` until it ends, or the input does -> its exit code, or 128 + N after signal N.

    Nothing that it started is left then; after SIGTERM each has 3 s until SIGKILL.
    """
    with adopting_orphans(), subprocess.Popen(argv, stdin=subprocess.DEVNULL) as child:
        handle = os.pidfd_open(child.pid)
        while sys.stdin in select.select([handle, sys.stdin], [], [])[0] and child.poll() is None:
            if not os.read(sys.stdin.fileno(), 1 << 16):
                _end_all(signal.SIGTERM, GRACE_S)
                break
        _end_all(signal.SIGKILL, GRACE_S)
        code = child.wait()
    return code if code >= 0 else 128 - code


def _end_all(signum: signal.Signals, limit_s: float) -> None:
    """Signal all that descends from here, and wait until it is gone, at most for so long."""
    told: set[int] = set()
    deadline = time.monotonic() + limit_s
    while left := [one for one in descendants(os.getpid()).values() if not one.ended]:
        for process in left:
            if process.pid not in told:
                told.add(process.pid)
                send(process, signum)
        if time.monotonic() > deadline:
            return
        time.sleep(LOOK_S / 5)


if __name__ == "__main__":
    sys.exit(hold(sys.argv[1:]))
