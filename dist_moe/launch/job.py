"""Runs or submits a job of `dist-moe launch`, on this host or a cluster, by any launcher."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dist_moe.launch.cluster import Cluster
from dist_moe.launch.command import Command, LaunchError
from dist_moe.launch.launcher import (
    OPTIONS,
    LaunchRequest,
    ProcessLauncher,
    Scheduler,
    load_launcher,
    load_launchers,
)
from dist_moe.launch.preflight import check_hosts
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.run_job import JobOutcome, run
from dist_moe.text import counted
from dist_moe.worker.contract import LAUNCH_VARIABLE
from dist_moe.worker.network import LOOPBACK, source_address

logger = logging.getLogger(__name__)
NETWORK_NOTE = (
    "workers exchange data over the network without encryption or a password; anyone who can join it can change what "
    "the job computes and saves, so run jobs on a private network (docs/security.md)"
)
HIDDEN = "HIDDEN"
"""Replaces the values of the user's variables, which may be secret, in what is printed."""


class Job:
    """A job of `dist-moe launch`.

    Args:
        name: The name of the launcher.
        request: What is asked for.

    Raises:
        LaunchError: The launcher does not support an option of the request.
    """

    def __init__(self, name: str, request: LaunchRequest) -> None:
        self.name = name
        self.request = request
        self.launcher = load_launcher(name)
        self._check_options()
        self.workers = self.launcher.workers(request)
        self._check_backend()
        logger.info("launcher %s: %d workers on %s", name, self.workers, self._hosts())

    @property
    def submits(self) -> bool:
        """Whether the job is handed to a queue."""
        return isinstance(self.launcher, Scheduler)

    @property
    def runs_here(self) -> bool:
        """Whether a worker runs on this host, as far as it is known."""
        cluster = self.request.cluster
        return not self.submits and (cluster is None or any(host.is_here for host in cluster.hosts))

    def _hosts(self) -> str:
        if self.submits:
            return "nodes that the scheduler assigns"
        cluster = self.request.cluster
        return "this host" if cluster is None else ", ".join(f"{host.name} ({host.address})" for host in cluster.hosts)

    def command(self, base: Mapping[str, str]) -> Command:
        """Return the command of a launcher that runs as a child of this process.

        Args:
            base: The environment to start from.

        Raises:
            LaunchError: The launcher is not installed, or cannot start this job.
        """
        if not isinstance(self.launcher, ProcessLauncher):
            raise LaunchError(f"--launcher {self.name} submits jobs; use another launcher to run one here")
        return self.launcher.command(self.request, base)

    def dry_run(self, base: Mapping[str, str]) -> list[str]:
        """Return what the job would run or submit, as lines for a shell or the scheduler.

        The values of the user's variables for workers are hidden.

        Args:
            base: The environment to start from.

        Raises:
            LaunchError: As for `command`.
        """
        if isinstance(self.launcher, Scheduler):
            return [self.launcher.script(self.request)]
        names = self.request.cluster.settings.environment if self.request.cluster else ()
        return self.command({**base, **{name: HIDDEN for name in names if name in base}}).lines(base)

    def submit(self) -> str:
        """Submit the job and return the answer of the scheduler.

        Raises:
            LaunchError: The launcher is not a scheduler, or the scheduler refuses the job.
        """
        if not isinstance(self.launcher, Scheduler):
            raise LaunchError(f"--launcher {self.name} submits nothing; run the job instead")
        return self.launcher.submit(self.request, self.launcher.script(self.request))

    def run(self) -> JobOutcome:
        """Check the hosts of the cluster, and run the job to its end.

        Raises:
            LaunchError: As for `command`, or a host is not ready.
        """
        run_dir, cluster = Path(self.request.config.run.dir), self.request.cluster
        if cluster is None:
            with WorkerMonitor(LOOPBACK, self.workers, run_dir, multi_host=False) as monitor:
                return run(self.command(os.environ), run_dir, monitor)
        with WorkerMonitor(launch_address(cluster), self.workers, run_dir) as monitor:
            monitor.output.announce(NETWORK_NOTE)
            checked = check_hosts(cluster, self.request.config, Path(self.request.config_path), monitor.rendezvous)
            job = Job(self.name, replace(self.request, cluster=checked))
            return run(job.command({**os.environ, LAUNCH_VARIABLE: str(monitor.rendezvous)}), run_dir, monitor)

    def _check_options(self) -> None:
        """Refuse each option that the launcher would ignore."""
        request, launcher = self.request, self.launcher
        for option, flag in OPTIONS.items():
            value = getattr(request, option)
            if value and option not in launcher.options:
                able = [name for name, other in load_launchers().items() if option in other.options]
                raise LaunchError(
                    f"{flag} {value} is ignored by --launcher {self.name}; remove it, or use --launcher "
                    f"{' or '.join(able)}"
                )
        if request.runner and request.runner not in launcher.runners:
            raise LaunchError(f"unknown --runner {request.runner}; use {', '.join(launcher.runners)}")
        if isinstance(launcher, Scheduler):
            if request.asked_workers is not None:
                raise LaunchError(
                    f"--workers {request.asked_workers} is ignored by --launcher {self.name}; remove it, and set "
                    f"{launcher.workers_fields}"
                )
            return
        if request.cluster is None:
            self._refuse_cluster_options()
            return
        if not launcher.multi_host:
            raise LaunchError(f"--launcher {self.name} runs on one host; remove the hosts of the cluster section")
        if request.asked_workers not in (None, request.cluster.workers):
            raise LaunchError(
                f"--workers {request.asked_workers} contradicts the {counted(request.cluster.workers, 'slot')} of "
                "the cluster; remove it, or choose hosts by cluster.include"
            )
        if request.min_hosts and request.min_hosts > len(request.cluster.hosts):
            raise LaunchError(
                f"--min-hosts {request.min_hosts} is more than the {counted(len(request.cluster.hosts), 'host')} of "
                "the cluster; use a smaller number"
            )

    def _check_backend(self) -> None:
        """Refuse the MPI backend where each worker would be an MPI job of its own."""
        mpi = self.request.config.parallel.backend == "mpi"
        if mpi and self.workers > 1 and not self.launcher.starts_mpi(self.request.runner):
            raise LaunchError(
                f"parallel.backend=mpi needs a launcher of MPI, and --launcher {self.name} starts each of the "
                f"{self.workers} workers without it; use --launcher mpirun, or parallel.backend=gloo"
            )

    def _refuse_cluster_options(self) -> None:
        for option in ("min_hosts", "runner"):
            if value := getattr(self.request, option):
                raise LaunchError(
                    f"{OPTIONS[option]} {value} is ignored without a cluster; remove it, or set cluster.hosts"
                )


def launch_address(cluster: Cluster) -> str:
    """Return the address of this host by which the hosts of the cluster reach it.

    Raises:
        LaunchError: No route leads to the cluster.
    """
    remote = [host.address for host in cluster.hosts if not host.is_here]
    target = remote[0] if remote else cluster.hosts[0].address
    try:
        return source_address(target)
    except OSError as error:
        raise LaunchError(
            f"no network leads to {target} ({error.strerror}); fix the addresses of the cluster"
        ) from None
