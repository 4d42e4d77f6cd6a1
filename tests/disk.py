"""A small disk of its own for one process: a tmpfs in a mount namespace, which needs no rights and goes with it."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBC = ctypes.CDLL(None, use_errno=True)
READ_ONLY, REMOUNT, DETACH = 1, 32, 2
LIMIT_S = 200


def on_disk(disk: Path, size: str, argv: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with an empty disk of this size at `disk`, which only it and its children see, as their root."""
    disk.mkdir(parents=True, exist_ok=True)
    mounted = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, str(disk), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def run_on_disk(disk: Path, size: str, program: str, *words: str) -> str:
    """Run Python code with the disk's path and words as its arguments -> what it prints; AssertionError if it fails."""
    done = on_disk(disk, size, [sys.executable, "-c", program, str(disk), *words])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fill(disk: Path, room: int) -> Path:
    """Leave this much room, in bytes -> what takes the rest."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_bsize - room))
    return ballast


def set_read_only(disk: Path, read_only: bool) -> bool:
    """Remount it -> whether that was possible: not while a file is open for writing."""
    flags = REMOUNT | (READ_ONLY if read_only else 0)
    return LIBC.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", flags, None) == 0


def detach(disk: Path) -> None:
    """Let it vanish; what is open or mapped stays so."""
    if LIBC.umount2(os.fsencode(disk), DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(disk))
