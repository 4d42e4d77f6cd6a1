"""What the commands of all launchers share: the command itself and the workers' environment."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.errors import UserError
from dist_moe.launch.outer_job import without_outer_job

DEFAULT_PORT = 29500
# Variables that an outer launcher may have set, with which the workers would join its job.
OUTER_JOB_VARIABLES = (
    # What torchrun reads of its options from the environment unless they are on its command line.
    "PET_NODE_RANK",
    "PET_RDZV_BACKEND",
    "PET_RDZV_ENDPOINT",
    "PET_RDZV_CONF",
    "PET_STANDALONE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# Text that neither a shell nor pdsh (%h, %n) changes.
SHELL_SAFE = re.compile(r"[\w@+=:,./-]*", re.ASCII)
# Device files below /dev: NVIDIA, WSL, AMD, and Intel.
DEVICE_FILES = ("nvidia*", "dxg", "kfd", "dri/renderD*", "accel*")


class LaunchError(UserError, RuntimeError):
    """A job that cannot be started. The message has value, rule and remedy."""


@dataclass(frozen=True)
class Command:
    """A launcher's command, ready to run.

    Attributes:
        launcher: The name of the launcher.
        argv: Program and arguments.
        environment: The whole environment of the launcher, which the workers inherit.
        remote_commands: Further commands of the same job, started together with `argv`; one for each other host.
        restarts: Whether the launcher restarts failed workers.
        secret_files: Files with values of the user's variables, to be deleted when the job ends.
    """

    launcher: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    remote_commands: tuple[tuple[str, ...], ...] = ()
    restarts: bool = False
    secret_files: tuple[Path, ...] = ()

    def lines(self, base: Mapping[str, str]) -> list[str]:
        """Return the commands, each as one line for a shell whose environment is `base`."""
        return [self._line(self.argv, base), *map(shlex.join, self.remote_commands)]

    def _line(self, argv: tuple[str, ...], base: Mapping[str, str]) -> str:
        removed = [part for name in sorted(base.keys() - self.environment.keys()) for part in ("-u", name)]
        changed = [f"{k}={v}" for k, v in sorted(self.environment.items()) if base.get(k) != v]
        return shlex.join(["env", *removed, *changed, *argv] if removed or changed else argv)


def worker_environment(config: Config, workers: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job with all workers on this host.

    It is `base` without the variables of an outer job, and with those of `worker_variables`. PATH begins with the
    folder of this Python, so that the workers find the tools of its environment (ninja).

    Args:
        config: The configuration of the run; `run.threads` sets OMP_NUM_THREADS.
        workers: The number of workers on this host.
        base: The environment to start from.
    """
    threads = threads_per_worker(config.run.threads, workers)
    interface = {"GLOO_SOCKET_IFNAME": base["GLOO_SOCKET_IFNAME"]} if "GLOO_SOCKET_IFNAME" in base else {}
    return clean_env(base) | worker_variables(str(threads)) | interface


def worker_variables(threads: str) -> dict[str, str]:
    """Return the variables of workers that all run on one host.

    Args:
        threads: The value of OMP_NUM_THREADS.
    """
    return {
        # By default gloo resolves the host's name, which on some hosts gives an address that does not answer.
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": threads,
        # `python -m dist_moe` must not import a folder of that name in the working folder.
        "PYTHONSAFEPATH": "1",
    }


def clean_env(base: Mapping[str, str], removed_prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Return `base` without the variables of an outer job, and with the folder of this Python first on PATH.

    Args:
        base: The environment to start from.
        removed_prefixes: Variables that begin with one of these are removed too.
    """
    own = without_outer_job(base, OUTER_JOB_VARIABLES)
    kept = {name: value for name, value in own.items() if not name.startswith(removed_prefixes)}
    programs = str(Path(sys.executable).parent)
    return {**kept, "PATH": os.pathsep.join([programs, *filter(None, [base.get("PATH")])])}


def threads_per_worker(threads: int | str, workers: int) -> int:
    """Return the number of threads of each worker; "auto" divides the cores that this process may use."""
    return threads if isinstance(threads, int) else max(1, len(os.sched_getaffinity(0)) // workers)


def has_devices() -> bool:
    """Return whether this host has the device file of an accelerator."""
    return any(any(Path("/dev").glob(pattern)) for pattern in DEVICE_FILES)
