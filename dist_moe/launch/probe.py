"""Describes this host before a job starts on it; `preflight` runs it, with its question as JSON on stdin."""

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


def describe_host(question: dict[str, Any]) -> dict[str, Any]:
    """Return what this host has, as plain values.

    Args:
        question: config (a path), run_dir, mark (a file in run_dir, or null), launch (address and port where the launch
            listens), address (of this host), port (to be free, or null) and interface (or null).
    """
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "code": source_digest(),
        "config": file_hash(Path(question["config"])),
        "mark": question["mark"] is None or Path(question["run_dir"], question["mark"]).is_file(),
        "writable": write_error(Path(question["run_dir"])),
        "launch": connect_error(*question["launch"]),
        "address": is_local_address(question["address"]),
        "port": "" if question["port"] is None else listen_error(question["address"], question["port"]),
        "interface": question["interface"] in (None, *(name for _, name in socket.if_nameindex())),
        "cores": len(os.sched_getaffinity(0)),
        "devices": len(list(Path("/dev").glob("nvidia[0-9]*"))),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that affect a run's numbers; None if one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def file_hash(path: Path) -> str:
    """Return the hash of a file, or `!` and why it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"!{error.strerror}"


def write_error(folder: Path) -> str:
    """Return why no file can be created in a folder, or ""."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        return str(error.strerror)
    return ""


def connect_error(address: str, port: int) -> str:
    """Return why no connection can be made, or ""."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_LIMIT_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def listen_error(address: str, port: int) -> str:
    """Return why this process cannot listen there, or ""."""
    try:
        socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


if __name__ == "__main__":
    json.dump(describe_host(json.load(sys.stdin)), sys.stdout)
