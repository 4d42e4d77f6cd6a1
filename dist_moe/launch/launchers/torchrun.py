"""The launcher of PyTorch, `torchrun`: one command for this host, or one for each of several."""

import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_moe.launch.cluster import Cluster, Host, forwarded_env, launcher_environment
from dist_moe.launch.command import Command, worker_environment, worker_variables
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher
from dist_moe.launch.scripts import one_machine_script, several_hosts_script
from dist_moe.launch.template import ALL_ARGUMENTS, PYTHON, shell_command, shell_exports, shell_variable
from dist_moe.worker.contract import VISIBLE_DEVICES_VARIABLE
from dist_moe.worker.network import LOOPBACK, free_port

# Restarted workers need a store of their own: the store of torchrun still has the addresses of the failed ones.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
OWN_ENTRY_SCRIPT = """\
# The entry of this host.
HOST=${HOST:-$(hostname)}
NODES=$(hosts | awk 'END { print NR }')
SLOTS=$(hosts | awk -v host="$HOST" '$1 == host { print ($2 == "" ? 1 : $2) }')
if [ -z "$SLOTS" ]; then echo "$HOST is not in $HOSTFILE; set HOST to its name there" >&2; exit 2; fi
IS_FIRST=0
if [ "$HOST" = "$FIRST" ]; then IS_FIRST=1; fi"""


class TorchrunLauncher(ProcessLauncher):
    """`python -m torch.distributed.run`."""

    summary = "workers are to be restarted after a failure, or hosts may be lost (`--max-restarts`, `--min-hosts`)"
    options = frozenset({"max_restarts", "min_hosts"})

    def command(self, request: LaunchRequest, base: Mapping[str, str]) -> Command:
        """Return the command for this host, or one for each host of the cluster, through ssh where it is not this one.

        The hosts meet at the first one. A job with `min_hosts` starts with that number of hosts, and continues with it.
        """
        log_dir = Path(request.config.run.dir) / "torchrun"
        if request.cluster is not None:
            return self._cluster_command(request, request.cluster, log_dir, base)
        restarts = request.max_restarts
        environment = worker_environment(request.config, request.workers, base) | (OWN_STORE if restarts else {})
        argv = one_host_argv(
            sys.executable,
            request.worker_arguments,
            workers=str(request.workers),
            port=str(free_port()),
            module=request.module,
            restarts=restarts,
            log_dir=log_dir,
        )
        return Command("torchrun", argv, environment, restarts=restarts > 0)

    def _cluster_command(
        self, request: LaunchRequest, cluster: Cluster, log_dir: Path, base: Mapping[str, str]
    ) -> Command:
        forwarded = forwarded_env(request.config, cluster, base) | OWN_STORE
        environment = launcher_environment(base, forwarded)
        first, count = cluster.hosts[0], len(cluster.hosts)
        fewest = count if request.min_hosts is None else request.min_hosts
        # An IPv6 address has to be in brackets before a port.
        meeting = f"[{first.address}]" if ":" in first.address else first.address
        run_id = f"dist-moe-{secrets.token_hex(4)}"

        def command_for(host: Host) -> tuple[str, ...]:
            argv = host_argv(
                cluster.python,
                request.worker_arguments,
                nodes=f"{fewest}:{count}",
                workers=str(len(host.devices)),
                run_id=run_id,
                endpoint=f"{meeting}:{cluster.settings.port}",
                is_first=str(int(host is first)),
                address=host.address,
                module=request.module,
                restarts=request.max_restarts,
                log_dir=log_dir,
            )
            devices = {VISIBLE_DEVICES_VARIABLE: ",".join(map(str, host.devices))}
            if host.is_here:
                return ("env", "-C", cluster.folder, *(f"{k}={v}" for k, v in devices.items()), *argv)
            remote = (cluster.python, "-m", "dist_moe.launch.supervise.remote_exec", *argv)
            return cluster.ssh(host, remote, forwarded | devices)

        commands = [command_for(host) for host in cluster.hosts]
        return Command("torchrun", commands[0], environment, tuple(commands[1:]), request.max_restarts > 0)

    def files(self, request: LaunchRequest) -> Mapping[str, str]:
        """Return a script for one machine, and one to run on each of several hosts."""
        worker = ("train", shell_variable("CONFIG"), *request.overrides, ALL_ARGUMENTS)
        one = one_host_argv(PYTHON, worker, workers=shell_variable("WORKERS"), port=shell_variable("PORT"))
        each = host_argv(
            PYTHON,
            worker,
            nodes=shell_variable("NODES"),
            workers=shell_variable("SLOTS"),
            run_id="dist-moe",
            endpoint=f"{shell_variable('FIRST')}:{shell_variable('PORT')}",
            is_first=shell_variable("IS_FIRST"),
            address=shell_variable("HOST"),
        )
        return {
            "one_machine/torchrun.sh": one_machine_script(
                request, "torchrun", shell_exports(worker_variables(shell_variable("THREADS"))), shell_command(one)
            ),
            "several_hosts/torchrun.sh": several_hosts_script(
                request,
                "torchrun",
                where="on each host",
                prepare=OWN_ENTRY_SCRIPT,
                exports=shell_exports(OWN_STORE),
                command=shell_command(each),
            ),
        }


def one_host_argv(
    python: str,
    worker_arguments: Sequence[str],
    *,
    workers: str,
    port: str,
    module: str = "dist_moe",
    restarts: int = 0,
    log_dir: Path | None = None,
) -> tuple[str, ...]:
    """Return the command for workers that all run on this host.

    The address of the rendezvous is fixed: with `--standalone`, torchrun waits forever if the host's name does not
    resolve.
    """
    rendezvous: tuple[str, ...] = ("--master-addr", LOOPBACK, "--master-port", port)
    if restarts:
        # At a fixed address all attempts share one store.
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:{port}", "--rdzv-conf", "is_host=1")
    arguments = (
        *("--nnodes", "1", "--nproc-per-node", workers),
        *rendezvous,
        *("--local-addr", LOOPBACK),
        *_common_arguments(module, restarts, log_dir),
    )
    return (python, "-m", "torch.distributed.run", *arguments, *worker_arguments)


def host_argv(
    python: str,
    worker_arguments: Sequence[str],
    *,
    nodes: str,
    workers: str,
    run_id: str,
    endpoint: str,
    is_first: str,
    address: str,
    module: str = "dist_moe",
    restarts: int = 0,
    log_dir: Path | None = None,
) -> tuple[str, ...]:
    """Return the command for the workers of one of several hosts.

    Args:
        python: The path of Python on that host.
        worker_arguments: The arguments of each worker.
        nodes: The number of hosts, or MIN:MAX.
        workers: The number of workers on that host.
        run_id: The name of the job, the same on all hosts.
        endpoint: HOST:PORT where the hosts meet, on the first one.
        is_first: "1" on the first host, "0" on the others.
        address: The address by which other hosts reach that host.
        module: Each worker runs `python -m MODULE`.
        restarts: How often failed workers are restarted.
        log_dir: A folder for torchrun's own files.
    """
    arguments = (
        *("--nnodes", nodes, "--nproc-per-node", workers),
        *("--rdzv-backend", "c10d", "--rdzv-id", run_id),
        *("--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={is_first}"),
        *("--local-addr", address),
        *_common_arguments(module, restarts, log_dir),
    )
    return (python, "-m", "torch.distributed.run", *arguments, *worker_arguments)


def _common_arguments(module: str, restarts: int, log_dir: Path | None) -> tuple[str, ...]:
    # By default every job leaves a folder in the system's place for temporary files.
    logs = () if log_dir is None else ("--log-dir", str(log_dir))
    return ("--max-restarts", str(restarts), *logs, "--module", module)


LAUNCHER = TorchrunLauncher()
