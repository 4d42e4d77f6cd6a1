"""A job as `dist-moe launch` was asked for it: on this host or a cluster, by one of the launchers."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.launch.cluster import Cluster
from dist_moe.launch.command import Command, LaunchError
from dist_moe.launch.launchers.deepspeed import DEEPSPEED_VARIABLES, deepspeed_cluster_command, deepspeed_command
from dist_moe.launch.launchers.kubernetes import apply, kubernetes_objects, manifest
from dist_moe.launch.launchers.mpirun import mpirun_cluster_command, mpirun_command
from dist_moe.launch.launchers.slurm import slurm_script, submit
from dist_moe.launch.launchers.torchrun import torchrun_cluster_command, torchrun_command
from dist_moe.launch.preflight import check_hosts
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.run_job import Outcome, run
from dist_moe.worker.contract import LAUNCH_VARIABLE
from dist_moe.worker.network import LOOPBACK, source_address

HIDDEN = "HIDDEN"
"""Stands for values of the user's that may be secret."""


@dataclass(frozen=True)
class Job:
    """Everything that decides the commands; asked_workers: None for all slots of a cluster, or two on this host."""

    config: Config
    config_path: Path
    overrides: Sequence[str]
    launcher: str
    cluster: Cluster | None
    asked_workers: int | None = None
    runner: str = "pdsh"
    restarts: int = 0
    min_nodes: int | None = None

    @property
    def workers(self) -> int:
        if self.launcher == "slurm":
            return self.config.slurm.nodes * self.config.slurm.tasks_per_node
        if self.launcher == "kubernetes":
            return self.config.kubernetes.pods * self.config.kubernetes.workers_per_pod
        return self.cluster.workers if self.cluster else self.asked_workers or 2

    def command(self, base: Mapping[str, str]) -> Command:
        """LaunchError where this launcher cannot do what is asked."""
        self._refuse_idle_options()
        if self.asked_workers not in (None, self.workers):
            raise LaunchError(
                f"--workers {self.asked_workers} contradicts the {self.workers} slots of the cluster; leave it out, or "
                "choose hosts by cluster.include"
            )
        if self.cluster is None:
            here = (self.config, self.workers, self.config_path, self.overrides)
            if self.launcher == "torchrun":
                return torchrun_command(*here, restarts=self.restarts, base=base)
            return (mpirun_command if self.launcher == "mpirun" else deepspeed_command)(*here, base=base)
        what = (self.config, self.cluster, self.config_path, self.overrides)
        if self.launcher == "torchrun":
            return torchrun_cluster_command(*what, self.restarts, self.min_nodes, base)
        if self.launcher == "mpirun":
            return mpirun_cluster_command(*what, base)
        return deepspeed_cluster_command(*what, self.runner, base)

    def shown(self, base: Mapping[str, str]) -> list[str]:
        """The commands as lines for a shell whose environment is `base`, without what its variables hold for workers.

        LaunchError as `command`.
        """
        names = self.cluster.settings.environment if self.cluster else ()
        return self.command({**base, **{name: HIDDEN for name in names if name in base}}).lines(base)

    def _refuse_idle_options(self) -> None:
        """Nothing that was asked for is passed over in silence."""
        if self.restarts and self.launcher != "torchrun":
            raise LaunchError(f"--max-restarts {self.restarts} is torchrun's; leave it out, or use --launcher torchrun")
        if self.min_nodes and (self.launcher != "torchrun" or not self.cluster):
            raise LaunchError(
                f"--min-hosts {self.min_nodes} is torchrun's, over several hosts; leave it out, or use --launcher "
                "torchrun with a cluster"
            )
        if self.cluster and self.min_nodes and self.min_nodes > len(self.cluster.hosts):
            raise LaunchError(
                f"--min-hosts {self.min_nodes} is more than the {len(self.cluster.hosts)} hosts of the cluster; ask "
                "for fewer"
            )
        if self.runner != "pdsh" and (self.launcher != "deepspeed" or not self.cluster):
            raise LaunchError(
                f"--runner {self.runner} is of the deepspeed launcher over several hosts; leave it out, or use "
                "--launcher deepspeed with a cluster"
            )
        if self.launcher in ("slurm", "kubernetes") and self.asked_workers is not None:
            raise LaunchError(
                f"--workers {self.asked_workers} says nothing to --launcher {self.launcher}; leave it out, and set "
                f"the numbers of its section of the file ({self.launcher})"
            )

    def text(self) -> str:
        """What a scheduler is given: Slurm's batch script, or the manifest for Kubernetes. Errors: LaunchError."""
        self._refuse_idle_options()
        if self.launcher == "slurm":
            return slurm_script(self.config, self.config_path, self.overrides)
        return manifest(kubernetes_objects(self.config))

    def submit(self) -> str:
        """Hand it to the scheduler -> what that says."""
        return submit(self.config, self.text()) if self.launcher == "slurm" else apply(self.text())

    def run(self) -> Outcome:
        """Check the hosts, and run the job to its end."""
        run_dir = Path(self.config.run.dir)
        if self.cluster is None:
            with WorkerMonitor(LOOPBACK, self.workers, run_dir, multi_host=False) as monitor:
                return run(self.command(os.environ), run_dir, monitor)
        with WorkerMonitor(launch_address(self.cluster), self.workers, run_dir) as monitor:
            seen = check_hosts(self.cluster, self.config, self.config_path, monitor.rendezvous)
            command = replace(self, cluster=seen).command({**os.environ, LAUNCH_VARIABLE: str(monitor.rendezvous)})
            try:
                return run(command, run_dir, monitor)
            finally:
                if told := command.environment.get(DEEPSPEED_VARIABLES):
                    Path(told).unlink(missing_ok=True)


def launch_address(cluster: Cluster) -> str:
    """Return the address of this host that the cluster's hosts can reach.

    Raises:
        LaunchError: No route leads to them.
    """
    remote = [host.address for host in cluster.hosts if not host.is_here]
    target = remote[0] if remote else cluster.hosts[0].address
    try:
        return source_address(target)
    except OSError as error:
        raise LaunchError(f"no network leads to {target} ({error.strerror}); fix the cluster's addresses") from None
