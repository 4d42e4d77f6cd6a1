"""Disk faults during a save: a small file system that is full, read-only or unmounted while a checkpoint is written.

Requires a mount namespace in which the process may mount: `unshare --user --map-root-user --mount`.
"""

import ctypes
import os
import random
import shutil
import time
from pathlib import Path

from dist_moe.checkpoint.async_saver import AsyncSaver
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.layout import PARTIAL
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, digest_if_readable
from dist_moe.engine.train_state import TrainState
from tests.dist.resumable import overrides_of, same_bits, started
from tests.faults.files import CHANGES, LAST, SAVED, train_steps
from tests.faults.processes import find_lost
from tests.faults.row import Row

LIBC = ctypes.CDLL(None, use_errno=True)
READ_ONLY, REMOUNT, BIND, DETACH = 1, 32, 4096, 2
SIZE_BYTES = 16 << 20
FULL, READ_ONLY_DISK, UNMOUNTED = "full during a save", "read-only during a save", "unmounted during a save"
REASONS = {
    FULL: ("No space left",),
    READ_ONLY_DISK: ("Read-only",),
    UNMOUNTED: ("No such file", "does not see"),
}
KINDS = tuple(REASONS)


def inject(kind: str, seed: int, text: Path, made: Path, folder: Path) -> Row:
    """Resume from step 6 on a new disk, break the disk while step 7 is saved, repair it, and train to the end."""
    started_s, draw = time.monotonic(), random.Random(seed)
    disk, behind = folder / "disk", folder / "behind"
    for folder_of_disk in (disk, behind):
        folder_of_disk.mkdir(parents=True)
    mount("tmpfs", disk, "tmpfs", 0, f"size={SIZE_BYTES}")
    mount(str(disk), behind, "", BIND)
    try:
        shutil.copytree(made / "run", disk / "run")
        kept = {step: digest_if_readable(disk / f"run/checkpoints/step-{step:06d}/{MANIFEST_NAME}") for step in SAVED}
        with started(0, 1, overrides_of(text, disk / "run", *CHANGES)) as (resolved, training):
            train_steps(resolved, training, SAVED[-1] + 1, SAVED[-1] + 1)
            evidence, failures = break_during_save(kind, training, disk, behind, draw)
            older = {behind / f"run/checkpoints/step-{step:06d}": digest or "" for step, digest in kept.items()}
            failures += find_lost(older)
            train_steps(resolved, training, LAST, LAST)
        last = f"checkpoints/step-{LAST:06d}"
        failures += [f"{name} differs" for name in same_bits(disk / "run" / last, made / "whole" / last)]
    finally:
        for folder_of_disk in (disk, behind):
            LIBC.umount2(os.fsencode(folder_of_disk), DETACH)
        shutil.rmtree(folder, ignore_errors=True)
    return Row("file", f"disk {kind}", seed, True, evidence, "and saved again", failures, time.monotonic() - started_s)


def break_during_save(
    kind: str, training: TrainState, disk: Path, behind: Path, draw: random.Random
) -> tuple[str, list[str]]:
    """Start a save, break the disk before it ends, and repair it -> the evidence, and failures."""
    saver, step = AsyncSaver(training), training.balancer.steps_taken
    ballast = disk / "ballast"
    if kind == FULL:
        # So little space that the save starts and fails in the middle.
        space, free = draw.randrange(8 << 10, 600 << 10), shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - space))
    partial = disk / f"run/checkpoints/step-{step:06d}{PARTIAL}"
    started_save = False
    error_message = ""
    missed = False
    try:
        saver.start_save(step)
        started_save = partial.is_dir()
        broken = kind == FULL or break_disk(kind, disk, saver, draw)
        saver.finalize()
        missed = not broken
    except CheckpointError as error:
        error_message = str(error)
    if kind == FULL:
        ballast.unlink()
    elif kind == READ_ONLY_DISK:
        mount("tmpfs", disk, "tmpfs", REMOUNT)
    else:
        mount(str(behind), disk, "", BIND)
    if missed or not started_save:
        return "", []
    left = [path.name for path in (disk / "run/checkpoints").glob(f"*{step:06d}*") if PARTIAL not in path.name]
    failures = [f"a checkpoint of the failed save: {left}"] if left else []
    if not any(reason in error_message for reason in REASONS[kind]):
        failures.append(f"the error does not have the reason: {error_message}")
    return f"step {step} started, then {error_message.rpartition(': ')[2] or 'no error'}", failures


def break_disk(kind: str, disk: Path, saver: AsyncSaver, draw: random.Random) -> bool:
    """Break the disk while this rank's files are being written -> whether that was in time."""
    time.sleep(draw.random() * 0.004)
    while not saver.written:
        if kind == UNMOUNTED:
            return not LIBC.umount2(os.fsencode(disk), DETACH) and not saver.written
        # The kernel refuses while a file is open for writing; try until none is.
        if not LIBC.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", REMOUNT | READ_ONLY, None):
            return not saver.written
    return False


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """Call mount(2). Raises OSError."""
    arguments = (source.encode(), os.fsencode(target), kind.encode(), flags, options.encode())
    if LIBC.mount(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
