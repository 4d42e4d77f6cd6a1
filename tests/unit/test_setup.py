"""Which build of torch `make setup` installs: from real package indexes on this host that answer, hang and refuse."""

import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WANTED = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
VERSION = f"{WANTED.partition('==')[2]}+cpu"
LIMIT_S = 100.0
FALLBACK_S = 30.0
"""More than the time-outs of setup.sh, on a busy machine."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the files of a folder, and give the URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *values: object) -> None:
            """Write nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_index(folder: Path) -> None:
    """Make a package index with one small build of torch."""
    name = f"torch-{VERSION}-py3-none-any.whl"
    (folder / "torch").mkdir(parents=True)
    info = f"torch-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / "torch" / name, "w") as wheel:
        wheel.writestr("torch/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "torch" / "index.html").write_text(f'<a href="{name.replace("+", "%2B")}">{name}</a>')


def set_up(target: Path, index: str, path: str | None = None) -> tuple[str, float]:
    """Run setup.sh with a Python that has no torch, whose pip installs to `target` -> what it prints, and seconds."""
    changes = {"TORCH_INDEX": index, "PIP_TARGET": str(target), "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": ""}
    environment = {**os.environ, **changes, "PATH": path or os.environ["PATH"]}
    argv = ["sh", str(ROOT / "setup.sh"), getattr(sys, "_base_executable", sys.executable)]
    began_s = time.monotonic()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - began_s


@pytest.mark.slow
def test_the_build_of_the_index_is_installed(tmp_path: Path) -> None:
    write_index(tmp_path / "index")
    with served(tmp_path / "index") as url:
        told, _ = set_up(tmp_path / "target", url)
    assert told == f"torch: the build of {url}\n"
    assert (tmp_path / "target" / f"torch-{VERSION}.dist-info").is_dir()


@pytest.mark.parametrize("fault", ["hangs", "refuses", "is empty"])
def test_an_index_that_cannot_be_used_costs_seconds_and_not_the_setup(fault: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if fault == "refuses":
            listening.close()
            url = "http://127.0.0.1:1"
        else:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if fault == "is empty":
            with served(tmp_path) as url:
                told, took_s = set_up(tmp_path / "target", url)
        else:
            told, took_s = set_up(tmp_path / "target", url)
    assert told == f"torch: {url} cannot be used, so the default build of pip; set TORCH_INDEX for another index\n"
    assert took_s < FALLBACK_S and not (tmp_path / "target").exists()


def test_a_gpu_or_a_variable_selects_the_default_build(tmp_path: Path) -> None:
    assert set_up(tmp_path / "target", "pip")[0] == "torch: the default build of pip\n"
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    program.chmod(0o755)
    with_gpu = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    assert set_up(tmp_path / "target", "", with_gpu)[0] == "torch: the default build of pip\n"


def test_make_passes_the_index_on() -> None:
    argv = ["make", "-n", "-B", "setup", "VENV=nowhere", "TORCH_INDEX=http://example.org/whl"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert 'TORCH_INDEX="http://example.org/whl" sh setup.sh nowhere/bin/python' in done.stdout
