"""A worker whose disk or text fails at one step and is repaired at another.

Run as `python -m tests.unit.checkpoint.damaged ...`.

The worker is the real one, in a process of its own; all that is added is the blow, between two of its steps.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_moe.checkpoint import async_saver
from dist_moe.cli.main import train
from dist_moe.train import loop
from tests.disk import detach, set_read_only
from tests.dist.resumable import ROOT

LIMIT_S = 30.0


def make_read_only(disk: Path) -> None:
    """As soon as no file is open for writing."""
    deadline = time.monotonic() + LIMIT_S
    while not set_read_only(disk, True):
        assert time.monotonic() < deadline, "a file stays open for writing"
        time.sleep(0.01)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


STRIKE: dict[str, Callable[[Path], object]] = {
    "read-only": make_read_only,
    "gone": detach,
    "cut": cut,
}


def main(kind: str, where: str, strike_at: str, mend_at: str, *overrides: str) -> None:
    """Train, with the blow before step `strike_at`; what was begun to be saved then is written after it.

    mend_at: the step before which a read-only disk is made as it was; 0 for none.
    """
    run_step, write, struck = loop.run_step, async_saver._write, threading.Event()

    def step_and_blow(*given: Any) -> Any:
        step = given[1]
        if step == int(strike_at):
            STRIKE[kind](Path(where))
            struck.set()
        if step == int(mend_at):
            assert set_read_only(Path(where), False)
        return run_step(*given)

    def write_after_blow(snapshot: Any, partial: Path) -> Any:
        if f"{int(strike_at) - 1:06d}" in partial.name:
            assert struck.wait(LIMIT_S)
        return write(snapshot, partial)

    setattr(loop, "run_step", step_and_blow)  # noqa: B010  (its type is another)
    setattr(async_saver, "_write", write_after_blow)  # noqa: B010
    train(ROOT / "configs/debug.yaml", list(overrides), 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
