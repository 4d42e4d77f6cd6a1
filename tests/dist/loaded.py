"""Worker processes that are forked from a server which has torch, transformers and DeepSpeed loaded.

Importing the training loop costs 3 to 4 s of CPU time, and a test run starts more than a hundred workers. The server
(Python's forkserver) imports it once. A fork is safe only of a process with one thread and without process groups, so
the server runs with OMP_NUM_THREADS=1 and never computes anything; tests/dist/test_loaded.py holds both. The process
that runs the tests is never forked.
"""

import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = (
    "tests.dist.without_pandas",
    "dist_moe.train.loop",
    "deepspeed",
    # What the first step would import.
    "deepspeed.module_inject.auto_ep_layer",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "setuptools",
)
PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parents[2]
OF_SERVER = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}


def start_loaded(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start a process that calls `function(*args)`, which must be importable; it does not outlive this process."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with _environment(OF_SERVER):
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=_serve, args=(function, args), daemon=True)
    process.start()
    return process


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    # The server ends with the process that uses it, even if that is killed, unless a worker keeps its pipe open too.
    os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # See tests.dist.without_pandas; pyarrow, which asks for pandas when it makes an array, takes None for a module.
    modules: dict[str, Any] = sys.modules
    if modules.get("pandas", sys) is None:
        del modules["pandas"]
    function(*args)


class LoadedProcess:
    """`python -m MODULE ...` as a process forked from the server; the part of subprocess.Popen that tests use."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        output: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        """Start it in the root of the tree. argv: as for Popen. output, errors: the files to which it appends what it
        prints; errors go to the first if there is no second.
        """
        if list(argv[:2]) != [sys.executable, "-m"]:
            raise ValueError(f"argv={list(argv)} does not start with {sys.executable} -m")
        self.args = list(argv)
        self.returncode: int | None = None
        files = [str(path or os.devnull) for path in (output, errors or output)]
        self._process = start_loaded(_run_module, self.args[2:], dict(environment), files)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, -N after signal N; None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def run_loaded(argv: Sequence[str], folder: Path, limit_s: float = 200.0) -> subprocess.CompletedProcess[str]:
    """subprocess.run of `python -m MODULE ...` by a LoadedProcess; what it prints goes through files in `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        output, errors = Path(name) / "output", Path(name) / "errors"
        process = LoadedProcess(argv, os.environ, output, errors)
        try:
            code = process.wait(limit_s)
        finally:
            process.kill()
        return subprocess.CompletedProcess(argv, code, output.read_text(), errors.read_text())


def _run_module(argv: Sequence[str], environment: dict[str, str], files: Sequence[str]) -> None:
    """Become `python -m MODULE ARGUMENT...`, as far as the module can see."""
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(argv)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
