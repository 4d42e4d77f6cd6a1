"""Where the processes of a job on one host listen: on loopback alone, under every launcher."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.dist.test_launch import Job, Start, start
from tests.selection import slow

__all__ = ["start"]
# mpirun has no setting that closes its own sockets (docs/security.md).
EXEMPT = ("prterun", "mpirun", "prte", "orted", "mpirun.openmpi", "mpirun.mpich", "hydra_pmi_proxy")
LOOPBACK = ("127.0.0.1", "::1")


def listening(job: Job) -> dict[str, set[str]]:
    """The addresses at which the processes of a job listen, by the name of the program."""
    found: dict[str, set[str]] = {}
    for process in [psutil.Process(job.process.pid), *psutil.Process(job.process.pid).children(recursive=True)]:
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                found.setdefault(Path(process.exe()).name, set()).add(each.laddr.ip)
    return found


@pytest.mark.parametrize(
    ("launcher", "restarts"), [("torchrun", 1), slow("deepspeed", 0), slow("torchrun", 0), slow("mpirun", 0)]
)
def test_every_socket_of_a_job_on_one_host_listens_on_loopback(start: Start, launcher: str, restarts: int) -> None:
    job = start(launcher, "wait", restarts)
    found = listening(job)
    assert sum(name.startswith("python") for name in found) == 1, "the launch, the store and gloo listen"
    open_to_others = {name: addresses - set(LOOPBACK) for name, addresses in found.items() if name not in EXEMPT}
    assert not any(open_to_others.values()), open_to_others


def test_tokens_and_variables_are_in_no_argument_list(start: Start) -> None:
    job = start("torchrun", "wait")
    environments = []
    for process in psutil.Process(job.process.pid).children(recursive=True):
        words, environment = process.cmdline(), process.environ()
        token = environment.get("DIST_MOE_LAUNCH", "").removeprefix("tcp://").partition("@")[0]
        environments.append(token)
        assert not token or not any(token in word for word in words)
    assert any(len(token) > 20 for token in environments)
    logs = [path.read_text() for path in job.run_dir.rglob("*") if path.is_file()]
    assert not any(token in text for token in environments if len(token) > 20 for text in logs)


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
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "{'127.0.0.1'}"
