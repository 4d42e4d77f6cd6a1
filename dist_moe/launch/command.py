"""What all launchers' commands share: their record, the workers' environment and arguments."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.errors import UserError

# What an outer launcher may have left in the environment, and what would make the workers take part in its
# job.
OUTER_JOB = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# What a shell, and pdsh with its %h and %n, leave as it is.
NO_SHELL = re.compile(r"[\w@+=:,./-]*", re.ASCII)
OUTER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


# Under /dev, where the drivers of NVIDIA, of Windows' subsystem, of AMD and of Intel show a device.
DEVICE_FILES = ("nvidia*", "dxg", "kfd", "dri/renderD*", "accel*")


class LaunchError(UserError, RuntimeError):
    """A job that cannot be started; the message carries value, rule and remedy."""


@dataclass(frozen=True)
class Command:
    """A launcher's command, ready to run.

    launcher: its name. argv: program and arguments. environment: the whole environment of the launcher, which
    hands it on to the workers. beside: further commands that are part of the same job, one for each other host.
    restarts: whether the launcher starts workers again that have failed.
    """

    launcher: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    remote_commands: tuple[tuple[str, ...], ...] = ()
    restarts: bool = False

    def lines(self, base: Mapping[str, str]) -> list[str]:
        """The commands, each as one line for a shell whose environment is `base`."""
        return [self._line(self.argv, base), *map(shlex.join, self.remote_commands)]

    def _line(self, argv: tuple[str, ...], base: Mapping[str, str]) -> str:
        removed = [part for name in sorted(base.keys() - self.environment.keys()) for part in ("-u", name)]
        changed = [f"{k}={v}" for k, v in sorted(self.environment.items()) if base.get(k) != v]
        return shlex.join(["env", *removed, *changed, *argv] if removed or changed else argv)


def worker_arguments(config_path: str | Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """What each worker is called with; the same as a person would type after `dist-moe`."""
    return ("train", str(config_path), *overrides)


def worker_environment(config: Config, workers: int, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job with all its workers on this host: `base`, less an outer job's variables, plus

    OMP_NUM_THREADS: threads of each worker, from `run.threads`.
    PATH: the folder of this Python first, so that a tool of its environment (ninja) is found in the workers.
    PYTHONSAFEPATH: set, so that `python -m` takes dist_moe from where this process has it, not from a folder
    of that name in the working folder.
    GLOO_SOCKET_IFNAME: the loopback interface, unless it is set. Gloo else looks up the host's name, which
    some hosts resolve to an address that nobody answers: it then waits until its time-out.
    """
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        **clean_env(base),
        "OMP_NUM_THREADS": str(threads_per_worker(config.run.threads, workers)),
        "PYTHONSAFEPATH": "1",
    }


def clean_env(base: Mapping[str, str], left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """`base` with the folder of this Python first on PATH, less an outer job's variables and what begins so."""
    kept = {k: v for k, v in base.items() if k not in OUTER_JOB and not k.startswith((*OUTER_PREFIXES, *left_out))}
    programs = str(Path(sys.executable).parent)
    return {**kept, "PATH": os.pathsep.join([programs, *filter(None, [base.get("PATH")])])}


def threads_per_worker(threads: int | str, workers: int) -> int:
    """The number of threads of each worker; "auto" shares out the cores that this process may use."""
    return threads if isinstance(threads, int) else max(1, len(os.sched_getaffinity(0)) // workers)


def has_devices() -> bool:
    """Whether the drivers of this host show an accelerator."""
    return any(any(Path("/dev").glob(pattern)) for pattern in DEVICE_FILES)
