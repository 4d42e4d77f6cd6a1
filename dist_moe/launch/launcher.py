"""The extension point for launchers: what a module of `dist_moe/launch/launchers` provides, and how it is found."""

import importlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from dist_moe.config.schema import Config
from dist_moe.launch.cluster import Cluster
from dist_moe.launch.command import Command
from dist_moe.launch.launchers import launcher_names

DEFAULT_WORKERS = 2
OPTIONS = {"max_restarts": "--max-restarts", "min_hosts": "--min-hosts", "runner": "--runner"}
"""The options of a launch that a launcher may understand -> their names on the command line."""


@dataclass(frozen=True)
class LaunchRequest:
    """What a launch is asked for.

    Attributes:
        config: The checked configuration.
        config_path: The path of its file, as the workers read it.
        overrides: KEY=VALUE arguments that replace values of the file.
        cluster: The hosts, or None to run on this host alone.
        asked_workers: The value of --workers, or None.
        runner: The value of --runner, or None.
        max_restarts: How often failed workers are restarted.
        min_hosts: The number of hosts that the job needs at least, or None for all.
        module: Each worker runs `python -m MODULE train CONFIG_PATH OVERRIDES`.
    """

    config: Config
    config_path: str | Path
    overrides: Sequence[str] = ()
    cluster: Cluster | None = None
    asked_workers: int | None = None
    runner: str | None = None
    max_restarts: int = 0
    min_hosts: int | None = None
    module: str = "dist_moe"

    @property
    def workers(self) -> int:
        """The number of workers of a job that this process starts."""
        return self.cluster.workers if self.cluster else self.asked_workers or DEFAULT_WORKERS

    @property
    def worker_arguments(self) -> tuple[str, ...]:
        """The arguments of each worker, as a person would type them after `dist-moe`."""
        return ("train", str(self.config_path), *self.overrides)


class Launcher(Protocol):
    """A program that starts the workers of a job.

    A module `dist_moe/launch/launchers/NAME.py` makes the launcher NAME available by an object LAUNCHER of a class that
    inherits from `ProcessLauncher` or `Scheduler`.

    Attributes:
        summary: When to use it, as half a sentence; shown in `launch/README.md`.
        options: The keys of OPTIONS that it understands; a launch refuses the others.
        runners: The accepted values of --runner, the default first.
        multi_host: Whether it can start workers on other hosts.
    """

    summary: str
    options: frozenset[str] = frozenset()
    runners: tuple[str, ...] = ()
    multi_host: bool = True

    def workers(self, request: LaunchRequest) -> int:
        """Return the number of workers of the job."""
        return request.workers

    def starts_mpi(self, runner: str | None) -> bool:
        """Return whether its workers find each other by MPI, as `parallel.backend=mpi` needs.

        Args:
            runner: The value of --runner, if given.
        """
        return False

    def files(self, request: LaunchRequest) -> Mapping[str, str]:
        """Return the files for `dist-moe launch --write`, path -> text, which must not depend on this machine."""
        return {}


@runtime_checkable
class ProcessLauncher(Launcher, Protocol):
    """A launcher that runs as long as its workers, as a child of `dist-moe launch`."""

    @abstractmethod
    def command(self, request: LaunchRequest, base: Mapping[str, str]) -> Command:
        """Return the command that starts the workers.

        Args:
            request: The job; `request.cluster` is None for a job on this host.
            base: The environment to start from.

        Raises:
            LaunchError: The launcher is not installed, or cannot start this job.
        """


@runtime_checkable
class Scheduler(Launcher, Protocol):
    """A launcher that hands the job to a queue and returns.

    Attributes:
        workers_fields: The configuration fields that set the number of workers, for messages.
    """

    workers_fields: str

    @abstractmethod
    def script(self, request: LaunchRequest) -> str:
        """Return what the scheduler is given: a batch script or a manifest."""

    @abstractmethod
    def submit(self, request: LaunchRequest, script: str) -> str:
        """Submit the script and return the scheduler's answer.

        Raises:
            LaunchError: The scheduler is not installed, or refuses the job.
        """


def load_launcher(name: str) -> ProcessLauncher | Scheduler:
    """Import a launcher by its name, one of `launcher_names`."""
    module = importlib.import_module(f"dist_moe.launch.launchers.{name}")
    launcher: ProcessLauncher | Scheduler = module.LAUNCHER
    return launcher


def load_launchers() -> dict[str, ProcessLauncher | Scheduler]:
    """Import all launchers: name -> launcher."""
    return {name: load_launcher(name) for name in launcher_names()}
