"""A worker for the tests of launching: joins the others, meets them once, then does what LAUNCH_ACT says."""

import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from dist_moe.comm.bootstrap import join_world
from dist_moe.comm.failure import exit_hard, report_failure
from dist_moe.comm.place import read_place
from dist_moe.config import ConfigError, Violation, load_config

SEEN_S = 0.3
"""A worker that lives this long after its record is written has been seen by the launch, on a busy host too."""


def main() -> None:
    """Called as `train CONFIG [key=value]...`, like the real worker."""
    config = load_config(sys.argv[2], sys.argv[3:])
    place = read_place(os.environ)
    with (
        report_failure(config.run.dir, place.rank),
        join_world(place, "gloo", config.parallel.timeout_s),
        exit_hard(config.run.dir, place.rank),
    ):
        name = os.environ["LAUNCH_ACT"]
        prepare(name)
        meet()
        sys.stdout.write(f"rank {place.rank} of {place.world_size} is up\n")
        sys.stdout.flush()
        act(name, place.rank)


def prepare(name: str) -> None:
    """What has to be so on every rank before the test looks."""
    if name == "stray":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    if name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def act(name: str, rank: int) -> None:
    """Rank 1 does what the name says, while the others wait for it in an all-to-all, as between experts."""
    if name == "config":
        raise ConfigError([Violation("data.sources", "x", "is not there", "name another")])
    if rank == 1:
        misbehave(name)
    elif name == "deaf":
        time.sleep(600)
    meet()


def misbehave(name: str) -> None:
    """Does not come back, but for "finish"."""
    time.sleep(SEEN_S)
    if name in ("raise", "deaf"):
        raise ValueError("boom\n\nin two paragraphs")
    if name == "leave":
        sys.exit(3)
    if name == "vanish":
        os._exit(0)
    if name in ("stand", "stray"):
        time.sleep(600)
    if name in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[name])


def meet() -> None:
    """Waits in an all-to-all for every rank."""
    sent = torch.ones(dist.get_world_size(), 4)
    dist.all_to_all_single(torch.empty_like(sent), sent)


if __name__ == "__main__":
    main()
