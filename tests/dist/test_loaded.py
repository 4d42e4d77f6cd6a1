"""The server that workers are forked from: what it has loaded, that forking it is safe, and what outlives it."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest

import dist_moe
from tests.dist.loaded import PRELOADED, ROOT, LoadedProcess, start_loaded
from tests.dist.test_pool import is_alive

LIMIT_S = 200.0


def describe(connection: Connection) -> None:
    """Sends what a worker finds: modules that are not loaded, threads and children of the server, and its own."""
    import torch.distributed as dist

    server = Path(f"/proc/{os.getppid()}")
    missing = [name for name in PRELOADED if name not in sys.modules]
    threads = [len(list((process / "task").iterdir())) for process in (server, Path("/proc/self"))]
    origin = Path(str(dist_moe.__file__)).parents[1]
    connection.send((missing, threads, dist.is_initialized(), origin, (server / "cmdline").read_bytes()))


def test_workers_are_forked_from_one_thread_that_has_all_loaded_and_no_group() -> None:
    ours, theirs = Pipe()
    process = start_loaded(describe, theirs)
    assert ours.poll(LIMIT_S)
    missing, threads, grouped, origin, command = ours.recv()
    process.join(LIMIT_S)
    assert (missing, threads, grouped, origin) == ([], [1, 1], False, ROOT)
    assert b"multiprocessing.forkserver" in command, "the process of the tests is not forked"


def use_muon(connection: Connection) -> None:
    """Sends whether DeepSpeed's engine with its Muon optimizer loads torch's compiler, and a result of the latter."""
    import torch

    from dist_moe.engine.deepspeed import _import_muon

    _import_muon()
    from deepspeed.runtime.zero.muon.original_muon import muon_update, zeropower_via_newtonschulz5

    loaded = "torch._inductor.compile_fx" in sys.modules
    with torch.compiler.set_stance("force_eager"):
        orthogonal = zeropower_via_newtonschulz5(3 * torch.eye(4), steps=5)
        update = muon_update(torch.eye(4), torch.zeros(4, 4))
    connection.send((loaded, (orthogonal - torch.eye(4)).abs().max().item(), bool(update.isfinite().all())))


def test_the_engine_loads_torch_s_compiler_only_for_muon() -> None:
    ours, theirs = Pipe()
    process = start_loaded(use_muon, theirs)
    assert ours.poll(LIMIT_S)
    loaded, error, finite = ours.recv()
    process.join(LIMIT_S)
    assert finite
    assert not loaded and error < 0.4, "Newton-Schulz with 5 steps gives singular values of 0.7 to 1.2"


def test_a_module_runs_as_if_started_by_python(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dist_moe", "train", "configs/debug.yaml", "no.such=1"]
    output = tmp_path / "out"
    forked = LoadedProcess(argv, os.environ, output)
    started = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert forked.wait(LIMIT_S) == forked.poll() == started.returncode == 2
    assert output.read_text() == started.stdout + started.stderr and "no=" in started.stderr


def test_a_signal_is_its_exit_code_and_a_limit_is_held() -> None:
    process = LoadedProcess([sys.executable, "-m", "tests.dist.sleeping"], os.environ)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    assert process.poll() is None
    process.kill()
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    process.send_signal(signal.SIGTERM)


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match="does not start with"):
        LoadedProcess(["sleep", "1"], {})


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them_even_if_it_is_killed(tmp_path: Path) -> None:
    """As after a test that hangs: nobody is left to end them in good order."""
    started = subprocess.Popen([sys.executable, "-m", "tests.dist.sleeping", str(tmp_path / "pid")], cwd=ROOT)
    try:
        deadline_s = time.monotonic() + LIMIT_S
        while not (tmp_path / "pid").exists():
            assert started.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.05)
    finally:
        started.kill()
        started.wait()
    worker = int((tmp_path / "pid").read_text())
    while is_alive(worker):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
