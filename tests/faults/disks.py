"""Disk faults inside a save: a small file system that is full, read-only or gone while a checkpoint is written.

For a process in a mount namespace of its own, where it may mount: `unshare --user --map-root-user --mount`.
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
from dist_moe.checkpoint.format.manifest import NAME, digest
from dist_moe.engine.train_state import TrainState
from tests.dist.resumable import overrides_of, same_bits, started
from tests.faults.files import CHANGES, LAST, SAVED, go
from tests.faults.processes import lost
from tests.faults.row import Row

LIBC = ctypes.CDLL(None, use_errno=True)
READ_ONLY, REMOUNT, BIND, DETACH = 1, 32, 4096, 2
SIZE_BYTES = 16 << 20
WORDS = {
    "full inside a save": ("No space left",),
    "read-only inside a save": ("Read-only",),
    "gone inside a save": ("No such file", "does not see"),
}
KINDS = tuple(WORDS)


def inject(kind: str, seed: int, text: Path, made: Path, folder: Path) -> Row:
    """Go on from step 6 on a disk of its own, break the disk while step 7 is saved, mend it, and go on to the end."""
    began_s, draw = time.monotonic(), random.Random(seed)
    disk, behind = folder / "disk", folder / "behind"
    for place in (disk, behind):
        place.mkdir(parents=True)
    mount("tmpfs", disk, "tmpfs", 0, f"size={SIZE_BYTES}")
    mount(str(disk), behind, "", BIND)
    try:
        shutil.copytree(made / "run", disk / "run")
        kept = {step: digest(disk / f"run/checkpoints/step-{step:06d}/{NAME}") for step in SAVED}
        with started(0, 1, overrides_of(text, disk / "run", *CHANGES)) as (resolved, training):
            go(resolved, training, SAVED[-1] + 1, SAVED[-1] + 1)
            proof, wrong = struck(kind, training, disk, behind, draw)
            wrong += lost({behind / f"run/checkpoints/step-{step:06d}": told or "" for step, told in kept.items()})
            go(resolved, training, LAST, LAST)
        last = f"checkpoints/step-{LAST:06d}"
        wrong += [f"{name} differs" for name in same_bits(disk / "run" / last, made / "whole" / last)]
    finally:
        for place in (disk, behind):
            LIBC.umount2(os.fsencode(place), DETACH)
        shutil.rmtree(folder, ignore_errors=True)
    return Row(
        "file", f"disk {kind}", seed, True, proof, "trained on, the next save held", wrong, time.monotonic() - began_s
    )


def struck(kind: str, training: TrainState, disk: Path, behind: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Begin a save, break the disk before it is over, and mend it afterwards -> the proof, and what is wrong."""
    saver, step = AsyncSaver(training), training.balancer.taken
    ballast = disk / "ballast"
    if kind == KINDS[0]:
        # So little room that the save begins, and ends in the middle.
        room, free = draw.randrange(8 << 10, 600 << 10), shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - room))
    partial = disk / f"run/checkpoints/step-{step:06d}{PARTIAL}"
    began = told = ""
    try:
        saver.save_async(step)
        began = "begun" if partial.is_dir() else ""
        broken = kind == KINDS[0] or break_disk(kind, disk, saver, draw)
        saver.finalize()
        told = "" if broken else "missed"
    except CheckpointError as error:
        told = str(error)
    if kind == KINDS[0]:
        ballast.unlink()
    elif kind == KINDS[1]:
        mount("tmpfs", disk, "tmpfs", REMOUNT)
    else:
        mount(str(behind), disk, "", BIND)
    if told == "missed" or not began:
        return "", []
    left = [path.name for path in (disk / "run/checkpoints").glob(f"*{step:06d}*") if PARTIAL not in path.name]
    wrong = [f"a checkpoint of the broken save: {left}"] if left else []
    if not any(word in told for word in WORDS[kind]):
        wrong.append(f"the reason is not told: {told}")
    return f"step {step} begun, then {told.rpartition(': ')[2] or 'nothing told'}", wrong


def break_disk(kind: str, disk: Path, saver: AsyncSaver, draw: random.Random) -> bool:
    """Break it while this rank's files are being written -> whether that came in time."""
    time.sleep(draw.random() * 0.004)
    while not saver.written:
        if kind == KINDS[2]:
            return not LIBC.umount2(os.fsencode(disk), DETACH) and not saver.written
        # Refused as long as a file is open for writing, so it is tried until one is closed.
        if not LIBC.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", REMOUNT | READ_ONLY, None):
            return not saver.written
    return False


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    words = (source.encode(), os.fsencode(target), kind.encode(), flags, options.encode())
    if LIBC.mount(*words):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
