"""Looks at one host before a job starts there: run by `preflight`, with a question as JSON on stdin."""

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

from dist_moe.worker.network import is_local_address
from dist_moe.worker.source_digest import source_digest

DISTRIBUTIONS = ("torch", "deepspeed", "transformers", "numpy", "mpi4py")
CONNECT_LIMIT_S = 5.0


def poll(question: dict[str, Any]) -> dict[str, Any]:
    """What this host has, as plain values.

    question: config (a path), run_dir, mark (a file there, or null), meeting ([address, port] of the launch), address
    (this host's), port (to be free, or null), interface (or null).
    """
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "code": source_digest(),
        "config": file_hash(Path(question["config"])),
        "mark": question["mark"] is None or Path(question["run_dir"], question["mark"]).is_file(),
        "writable": writable(Path(question["run_dir"])),
        "meeting": reach(*question["meeting"]),
        "address": is_local_address(question["address"]),
        "port": "" if question["port"] is None else bound(question["address"], question["port"]),
        "interface": question["interface"] in (None, *(name for _, name in socket.if_nameindex())),
        "cores": len(os.sched_getaffinity(0)),
        "devices": len(list(Path("/dev").glob("nvidia[0-9]*"))),
    }


def versions() -> dict[str, str | None]:
    """Of Python and what decides a run's numbers; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def file_hash(path: Path) -> str:
    """The hash of a file, or why it cannot be read, after a `!`."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"!{error.strerror}"


def writable(folder: Path) -> str:
    """Empty, or why no file can be made there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
        path.touch()
        path.unlink()
    except OSError as error:
        return str(error.strerror)
    return ""


def reach(address: str, port: int) -> str:
    """Empty, or why nothing answers there."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_LIMIT_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def bound(address: str, port: int) -> str:
    """Empty, or why this process cannot listen there."""
    try:
        socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


if __name__ == "__main__":
    json.dump(poll(json.load(sys.stdin)), sys.stdout)
