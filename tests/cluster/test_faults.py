"""Real faults of and between hosts: each is reported with host and remedy, and no process is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_moe
from tests.cluster.conftest import Launch, Start, count_step, logged, until_gone, write_config
from tests.cluster.hosts import Host, hosts, inner
from tests.selection import only_first

LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
LONG = 100_000
HOLDER = """
import socket, time
held = socket.create_server(("", 29500))
print("held", flush=True)
time.sleep(99)
"""
READY_S = 60.0
"""A preflight with an ssh that gives up after 10 s, and the imports of a busy machine."""


def launchers_from(first: int) -> list[str]:
    """All launchers, another one first, so that each is the first of one test."""
    names = list(LAUNCHERS)
    return names[first:] + names[:first]


def worker_of(host: Host, rank: int) -> int:
    """The pid, on this machine, of a rank's worker on the host: by its environment, which it shares with its agent.

    Not that of another job on this machine.
    """
    there = os.readlink(f"/proc/{host.pid}/ns/pid")
    for folder in Path("/proc").iterdir():
        try:
            if os.readlink(folder / "ns/pid") != there:
                continue
            words = (folder / "environ").read_bytes().split(b"\0")
            status = (folder / "status").read_text()
        except (OSError, ValueError):
            continue
        ranks = {f"RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode()}
        if ranks & set(words) and b"dist_moe\0train" in (command := (folder / "cmdline").read_bytes()):
            parent = int(status.split("PPid:\t")[1].split()[0])
            if command == Path(f"/proc/{parent}/cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError(f"no worker of rank {rank} is on {host.name}")


@pytest.mark.parametrize("launcher", only_first(launchers_from(0)))
def test_a_killed_rank_of_another_host_is_reported(start: Start, three: list[Host], launcher: str) -> None:
    launch = start((1, 1), "--launcher", launcher, steps=LONG)
    launch.wait_for_step(2)
    os.kill(worker_of(three[1], 1), signal.SIGKILL)
    struck_s = time.monotonic()
    ended = launch.end(60)
    assert ended.code == 137, ended.errors
    assert "rank 1 on node1 was ended by SIGKILL (signal 9)" in ended.errors
    assert time.monotonic() - struck_s < 15
    assert not until_gone(three)


@pytest.mark.parametrize("launcher", only_first(launchers_from(1)))
def test_a_request_to_stop_reaches_every_host_and_the_run_resumes(
    start: Start, three: list[Host], launcher: str
) -> None:
    launch = start((1, 1), "--launcher", launcher, steps=LONG)
    launch.wait_for_step(2)
    os.kill(launch.pid, signal.SIGUSR1)
    ended = launch.end(60)
    told = "stopped on request (SIGUSR1): every rank saved its checkpoint; start again to resume"
    assert (ended.code, ended.errors.strip().splitlines()[-1]) == (75, told), ended.errors
    assert not until_gone(three)
    run = launch.folder / "run"
    stopped = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert logged(run)[-1] == stopped, "the checkpoint is that of the last step"
    again = start((1, 1), "--launcher", launcher, steps=stopped + 2)
    ended = again.end(100)
    assert ended.code == 0 and f"resuming after step {stopped}" in ended.output, ended.output + ended.errors
    assert logged(run)[-3:] == [stopped + 1, stopped + 2, stopped + 2], "two steps and the evaluation"


@pytest.mark.parametrize("launcher", only_first(launchers_from(2)))
def test_a_second_ctrl_c_ends_every_process_of_every_host(start: Start, three: list[Host], launcher: str) -> None:
    launch = start((1, 1), "--launcher", launcher, steps=LONG)
    launch.wait_for_step(2)
    assert any("dist_moe train" in line for line in three[1].processes())
    for _ in range(2):
        os.kill(launch.pid, signal.SIGINT)
        time.sleep(0.01)
    ended = launch.end(30)
    assert (ended.code, ended.errors.strip().splitlines()[-1]) == (130, "stopped by SIGINT; every process has ended")
    assert not until_gone(three)


@pytest.mark.parametrize("launcher", only_first(launchers_from(0)))
def test_ctrl_c_before_the_workers_have_started_leaves_no_process(
    start: Start, three: list[Host], launcher: str
) -> None:
    launch = start((1, 1), "--launcher", launcher, steps=LONG)
    deadline = time.monotonic() + READY_S
    while not any("run.yaml" in line or "orted" in line or "prted" in line for line in three[1].processes()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(launch.pid, signal.SIGINT)
    assert launch.end(30).code == 130
    assert not until_gone(three)


def test_workers_end_when_their_launch_is_killed(start: Start, three: list[Host]) -> None:
    launch = start((1, 1), "--launcher", "torchrun", steps=LONG)
    launch.wait_for_step(2)
    os.kill(launch.pid, signal.SIGKILL)
    launch.end(30)
    assert not until_gone(three)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts of their own, which the test breaks."""
    with hosts(2, prefix="frail") as up:
        yield up


def launch_on(pair: list[Host], folder: Path, *arguments: str) -> Launch:
    write_config(folder, pair, (1, 1), LONG)
    return Launch(pair[0], folder, ("--launcher", "torchrun", *arguments))


def test_a_host_that_dies_is_reported(pair: list[Host], tmp_path: Path) -> None:
    launch = launch_on(pair, tmp_path)
    launch.wait_for_step(2)
    pair[1].end()
    ended = launch.end(60)
    assert ended.code != 0 and "rank 1 on frail1 was lost: its host ended" in ended.errors, ended.errors
    assert not until_gone(pair[:1])


def test_a_host_that_is_disconnected_is_reported_and_ends_its_workers(pair: list[Host], tmp_path: Path) -> None:
    launch = launch_on(pair, tmp_path)
    launch.wait_for_step(2)
    pair[1].cut_off()
    struck_s = time.monotonic()
    ended = launch.end(90)
    assert ended.code != 0 and "rank 1 on frail1 was lost" in ended.errors, ended.errors
    assert time.monotonic() - struck_s < 45
    while pair[1].processes() and time.monotonic() - struck_s < 60:
        time.sleep(0.2)
    assert not until_gone(pair)


def test_preflight_reports_all_faults_together(start: Start, three: list[Host], tmp_path: Path) -> None:
    """A host that does not exist, a port that is taken, other code: three lines, and no worker is started."""
    other = tmp_path / "other.py"
    package = Path(dist_moe.__file__)
    other.write_text(package.read_text() + "\n# another version\n")
    subprocess.run(three[1].argv(["mount", "--bind", str(other), str(package)], Path("/")), check=True)
    holder = subprocess.Popen(three[0].argv([sys.executable, "-c", HOLDER], Path("/")), stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        entries = "[{name: node0}, {name: node1}, {name: ghost, address: 10.77.0.99}]"
        ended = start((1, 1), "--launcher", "torchrun", f"cluster.hosts={entries}", "train.global_batch_size=24").end(
            READY_S
        )
    finally:
        os.kill(inner(holder), signal.SIGKILL)
        holder.communicate()
        subprocess.run(three[1].argv(["umount", str(package)], Path("/")), check=True)
    assert ended.code == 2
    assert "ghost: ssh cannot log in" in ended.errors and "or leave it out (cluster.exclude)" in ended.errors
    assert "node0: port 29500 cannot be used (Address already in use); set cluster.port" in ended.errors
    assert "node1: its dist_moe differs from that of node0; install the same code on both" in ended.errors
    assert not (tmp_path / "run" / "logs").exists()


def test_preflight_reports_key_version_and_unshared_folder(start: Start, three: list[Host], tmp_path: Path) -> None:
    import numpy

    found = next(Path(numpy.__file__).parents[1].glob("numpy-*.dist-info/METADATA"))
    other = tmp_path / "METADATA"
    other.write_text(found.read_text().replace(f"\nVersion: {numpy.__version__}\n", "\nVersion: 2.0.0\n", 1))
    (tmp_path / "run").mkdir()
    (tmp_path / "unshared").mkdir()
    mounts = [
        (three[1], other, found),
        (three[1], tmp_path / "unshared", tmp_path / "run"),
        (three[0], tmp_path / "empty", Path("/root/.ssh/id_ed25519")),
    ]
    (tmp_path / "empty").write_text("no key\n")
    (tmp_path / "empty").chmod(0o600)
    for host, source, target in mounts[:2]:
        subprocess.run(host.argv(["mount", "--bind", str(source), str(target)], Path("/")), check=True)
    try:
        ended = start((1, 1), "--launcher", "torchrun").end(READY_S)
        assert ended.code == 2
        assert f"node1: numpy is 2.0.0, and {numpy.__version__} on node0; install the same" in ended.errors
        assert "node1: run.dir=run is not the same folder as here; share it, or set" in ended.errors
        host, source, target = mounts[2]
        subprocess.run(host.argv(["mount", "--bind", str(source), str(target)], Path("/")), check=True)
        try:
            ended = start((1, 1), "--launcher", "torchrun").end(READY_S)
        finally:
            subprocess.run(host.argv(["umount", str(target)], Path("/")), check=True)
        assert ended.code == 2 and "node1: ssh cannot log in" in ended.errors, ended.errors
        assert "Permission denied" in ended.errors and "try `ssh node1 true` by hand" in ended.errors
    finally:
        for host, _, target in mounts[:2]:
            subprocess.run(host.argv(["umount", str(target)], Path("/")), check=True)


def test_hosts_without_shared_storage_train_and_resume(start: Start, three: list[Host], tmp_path: Path) -> None:
    """The host of rank 0 has the whole checkpoint; the other fetches a copy on resume, and keeps nothing."""
    apart, run = tmp_path / "apart", tmp_path / "run"
    apart.mkdir()
    run.mkdir()
    subprocess.run(three[1].argv(["mount", "--bind", str(apart), str(run)], Path("/")), check=True)
    try:
        for steps in (3, 5):
            arguments = ("--launcher", "torchrun", "cluster.shared_storage=false")
            ended = start((1, 1), *arguments, steps=steps).end()
            assert ended.code == 0, ended.output + ended.errors
            saved = [path.name for path in sorted((run / "checkpoints" / f"step-{steps:06d}" / "state").iterdir())]
            assert saved == ["balance.safetensors", "rank-00000.safetensors", "rank-00001.safetensors", "training.json"]
            assert not list(apart.rglob("*.safetensors")), "the copy is deleted"
        assert "resuming after step 3" in ended.output and logged(run) == [1, 2, 3, 3, 4, 5, 5]
    finally:
        subprocess.run(three[1].argv(["umount", str(run)], Path("/")), check=True)


@pytest.mark.full  # the covering subset has the test of a lost host
def test_torchrun_restarts_a_failed_worker(start: Start, three: list[Host]) -> None:
    launch = start((1, 1), "--launcher", "torchrun", "--max-restarts", "2", steps=20)
    launch.wait_for_step(2)
    os.kill(worker_of(three[1], 1), signal.SIGKILL)
    ended = launch.end()
    assert ended.code == 0, ended.errors
    assert count_step(1, ended.output) == 2, "there was no checkpoint yet, so it started from the first step"


def test_torchrun_continues_without_a_lost_host(pair: list[Host], tmp_path: Path) -> None:
    launch = launch_on(pair, tmp_path, "--max-restarts", "3", "--min-hosts", "1", "train.steps=60")
    launch.wait_for_step(2)
    pair[1].end()
    ended = launch.end(150)
    assert ended.code == 0, ended.errors
    assert "1 worker, expert parallel 1" in ended.output
