"""A real training worker whose disk or text fails before one step and is repaired before another.

Run as `python -m tests.unit.checkpoint.damaged KIND PATH FAIL_AT REPAIR_AT OVERRIDES...`.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_moe.checkpoint import async_saver
from dist_moe.cli.run import train
from dist_moe.train import loop
from tests.disk import detach, set_read_only
from tests.dist.resumable import ROOT

LIMIT_S = 30.0


def make_read_only(disk: Path) -> None:
    """Remount read-only, as soon as no file is open for writing but locks; a failing disk does not wait for them."""
    deadline = time.monotonic() + LIMIT_S
    with open(os.devnull, "rb") as nothing:
        for descriptor in Path("/proc/self/fd").iterdir():
            if os.path.islink(descriptor) and os.readlink(descriptor).endswith(".lock"):
                os.dup2(nothing.fileno(), int(descriptor.name))
    while not set_read_only(disk, True):
        assert time.monotonic() < deadline, "a file stays open for writing"
        time.sleep(0.01)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


FAULTS: dict[str, Callable[[Path], object]] = {
    "read-only": make_read_only,
    "gone": detach,
    "cut": cut,
}


def main(kind: str, path: str, fail_at: str, repair_at: str, *overrides: str) -> None:
    """Train with a fault before step `fail_at`; a save that is pending then is written after the fault.

    Args:
        kind: A key of FAULTS.
        path: The disk or file.
        fail_at: The step before which the fault is injected.
        repair_at: The step before which a read-only disk becomes writable again; 0 for never.
        overrides: Of the configuration.
    """
    run_step, write, failed = loop.run_step, async_saver._write, threading.Event()

    def step_with_fault(*args: Any) -> Any:
        step = args[1]
        if step == int(fail_at):
            FAULTS[kind](Path(path))
            failed.set()
        if step == int(repair_at):
            assert set_read_only(Path(path), False)
        return run_step(*args)

    def write_after_fault(snapshot: Any, partial: Path) -> Any:
        if f"{int(fail_at) - 1:06d}" in partial.name:
            assert failed.wait(LIMIT_S)
        return write(snapshot, partial)

    setattr(loop, "run_step", step_with_fault)  # noqa: B010  (its type differs)
    setattr(async_saver, "_write", write_after_fault)  # noqa: B010
    train(ROOT / "configs/debug.yaml", list(overrides), 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
