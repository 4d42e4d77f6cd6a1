"""Where the processes of a job on one host listen: on loopback alone, under every launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_moe.config import load_config
from dist_moe.launch.cluster import read_cluster
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher, load_launcher
from tests.dist.test_launch import ROOT, Job, Start, start

__all__ = ["start"]
# mpirun has no setting that closes its own sockets (docs/security.md).
EXEMPT = ("prterun", "mpirun", "prte", "orted", "mpirun.openmpi", "mpirun.mpich", "hydra_pmi_proxy")
LOOPBACK = ("127.0.0.1", "::1")


def listening(job: Job) -> dict[int, set[str]]:
    """The addresses at which each process of a job listens, but those of MPI's own programs."""
    found: dict[int, set[str]] = {}
    for process in [psutil.Process(job.process.pid), *psutil.Process(job.process.pid).children(recursive=True)]:
        if Path(process.exe()).name not in EXEMPT:
            listeners = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
            found[process.pid] = {each.laddr.ip for each in listeners}
    return found


def workers(job: Job) -> dict[int, int]:
    """The processes of the workers: rank -> pid."""
    records = [json.loads(path.read_text()) for path in (job.run_dir / "workers").glob("rank-*.json")]
    return {record["rank"]: record["pid"] for record in records}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "restarts"), [("torchrun", 1), ("deepspeed", 0), ("torchrun", 0), ("mpirun", 0)])
def test_every_socket_of_a_job_on_one_host_listens_on_loopback(start: Start, launcher: str, restarts: int) -> None:
    job = start(launcher, "wait", restarts)
    found, pids = listening(job), workers(job)
    assert found[job.process.pid], "the launch"
    assert sorted(pids) == [0, 1]
    assert found[pids[0]], "the store, and gloo"
    assert found[pids[1]], "gloo"
    open_to_others = {pid: addresses - set(LOOPBACK) for pid, addresses in found.items()}
    assert not any(open_to_others.values()), open_to_others


@pytest.mark.slow
def test_tokens_and_variables_are_in_no_argument_list(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in a file of the run."""
    secret = "the-value-of-a-users-variable"
    monkeypatch.setenv("USERS_TOKEN", secret)
    job = start("torchrun", "wait")
    tokens, holders = set(), 0
    processes = psutil.Process(job.process.pid).children(recursive=True)
    for process in processes:
        environment = process.environ()
        tokens |= {environment.get("DIST_MOE_LAUNCH", "").removeprefix("tcp://").partition("@")[0]}
        holders += environment.get("USERS_TOKEN") == secret
    secrets = {secret, *(token for token in tokens if len(token) > 20)}
    assert len(secrets) == 2 and holders >= 2
    words = [word for process in (psutil.Process(job.process.pid), *processes) for word in process.cmdline()]
    texts = [path.read_text() for path in job.run_dir.rglob("*") if path.is_file()]
    assert not [text for text in (*words, *texts) if any(each in text for each in secrets)]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "mpirun"])
def test_variables_of_a_cluster_are_in_no_argument_list_and_no_public_file(launcher: str, tmp_path: Path) -> None:
    """The values of cluster.environment, and the launch's token, as each launcher would start several hosts."""
    changes = ["cluster.hosts=[{name: localhost, slots: 1}]", "cluster.environment=[USERS_TOKEN]"]
    config = load_config(ROOT / "configs" / "debug.yaml", [*changes, f"run.dir={tmp_path}"])
    base = {**os.environ, "USERS_TOKEN": "the-value", "DIST_MOE_LAUNCH": "tcp://the-token@127.0.0.1:1234"}
    request = LaunchRequest(config, "run.yaml", cluster=read_cluster(config.cluster))
    loaded = load_launcher(launcher)
    assert isinstance(loaded, ProcessLauncher)
    command = loaded.command(request, base)
    words = [word for argv, _ in command.processes() for word in argv]
    words += [word for argv in command.holders.values() for word in argv]
    assert not [word for word in (*words, *command.files.values()) if "the-value" in word or "the-token" in word]
    held = command.held_variables or command.environment
    assert held["USERS_TOKEN"] == "the-value"


def test_a_single_process_listens_on_loopback() -> None:

    code = """
import psutil
from dist_moe.comm.init import init_distributed
from dist_moe.worker.rank_info import RankInfo
with init_distributed(RankInfo(), "gloo", 60):
    import torch, torch.distributed as dist
    dist.new_group([0], backend="gloo")
    dist.all_reduce(torch.ones(1))
    print({each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"})
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "{'127.0.0.1'}"
