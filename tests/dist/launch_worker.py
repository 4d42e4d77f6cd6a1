"""A worker for the tests of launching: joins the process group, then does what LAUNCH_ACT names."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dist_moe.cli.run import fork_agent
from dist_moe.comm.init import init_distributed
from dist_moe.config import ConfigError, Violation, load_config
from dist_moe.worker.contract import STOPPED_CODE, WorkerState
from dist_moe.worker.exit import exit_hard, report_failure, write_record
from dist_moe.worker.rank_info import rank_info_from_env

RECEIVED: list[int] = []
RECORDED_S = 0.3
"""After this time the launch has read a worker's record, on a busy host too."""


def main() -> None:
    """Called as `train CONFIG [key=value]...`, like the real worker."""
    config = load_config(sys.argv[2], sys.argv[3:])
    rank_info = rank_info_from_env(os.environ)
    fork_agent(rank_info.rank, rank_info.world_size, config.run.dir)
    with (
        report_failure(config.run.dir, rank_info.rank),
        init_distributed(rank_info, "gloo", config.parallel.timeout_s),
        exit_hard(config.run.dir, rank_info.rank),
    ):
        name = os.environ["LAUNCH_ACT"]
        prepare(name)
        meet()
        sys.stdout.write(f"rank {rank_info.rank} of {rank_info.world_size} is up\n")
        sys.stdout.flush()
        meet()  # no rank fails, and with it ends the job, before every rank has reported
        act(name, rank_info.rank)


def prepare(name: str) -> None:
    """What every rank does before it reports that it is up."""
    if name == "stray":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    if name.startswith("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if name in ("stop", "break"):
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, lambda number, frame: RECEIVED.append(number))


def act(name: str, rank: int) -> None:
    """Rank 1 does what the name says, while the others wait for it in an all-to-all."""
    if name == "config":
        raise ConfigError([Violation("data.sources", "x", "is not there", "name another")])
    if name in ("stop", "break"):
        work_until_stopped(name, rank)
    elif rank == 1:
        misbehave(name)
    elif name == "deaf":
        time.sleep(600)
    meet()


def work_until_stopped(name: str, rank: int) -> None:
    """Step until any rank has received a signal; then exit as a worker does after it saved a checkpoint, or fail."""
    stop = torch.zeros(1)
    while not stop:
        time.sleep(0.05)
        stop = torch.tensor([float(bool(RECEIVED))])
        dist.all_reduce(stop)
    if name == "break" and rank == 1:
        raise ValueError("the disk is full")
    meet()
    sys.stdout.write(f"received {signal.Signals(RECEIVED[0]).name}\n")
    sys.stdout.flush()
    write_record(Path(load_config(sys.argv[2]).run.dir), rank, WorkerState.STOPPED, code=STOPPED_CODE)
    os._exit(STOPPED_CODE)


def misbehave(name: str) -> None:
    """Fail or hang; returns for "finish", and for "again" after a restart."""
    time.sleep(RECORDED_S)
    if name == "again" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    if name in ("raise", "deaf"):
        raise ValueError("boom\n\nin two paragraphs")
    if name == "leave":
        sys.exit(3)
    if name == "vanish":
        os._exit(0)
    if name in ("wait", "stray", "deaf alone"):
        time.sleep(600)
    if name in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[name])


def meet() -> None:
    """Wait in an all-to-all for every rank."""
    sent = torch.ones(dist.get_world_size(), 4)
    dist.all_to_all_single(torch.empty_like(sent), sent)


if __name__ == "__main__":
    main()
