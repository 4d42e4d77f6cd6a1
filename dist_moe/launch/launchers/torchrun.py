"""The launcher of PyTorch, `torchrun`: one command for this host, or one for each of several."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_moe.launch.cluster import Cluster, Host, forwarded_env, launcher_environment
from dist_moe.launch.command import Command, private_path, worker_environment, worker_variables
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher
from dist_moe.launch.scripts import one_machine_script, several_hosts_script
from dist_moe.launch.template import ALL_ARGUMENTS, PYTHON, shell_command, shell_exports, shell_variable
from dist_moe.worker.contract import BACKEND, PORT_VARIABLE, SECRET_VARIABLE, VISIBLE_DEVICES_VARIABLE
from dist_moe.worker.network import LOOPBACK, free_port

# Workers have a store of their own, on one address (dist_moe/comm/store.py): that of torchrun listens on every
# interface, and after a restart still has the addresses of the failed workers.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PRIVATE_FILE_SCRIPT = """\
# Nothing of torchrun listens: its rendezvous is a file without a name, which only you can read.
RENDEZVOUS=$(mktemp)
exec 3<>"$RENDEZVOUS"
rm "$RENDEZVOUS"
RENDEZVOUS=/proc/self/fd/3"""
OWN_ENTRY_SCRIPT = """\
# The entry of this host.
HOST=${HOST:-$(hostname)}
NODES=$(hosts | awk 'END { print NR }')
SLOTS=$(hosts | awk -v host="$HOST" '$1 == host { print ($2 == "" ? 1 : $2) }')
if [ -z "$SLOTS" ]; then echo "$HOST is not in $HOSTFILE; set HOST to its name there" >&2; exit 2; fi
INDEX=$(hosts | awk -v host="$HOST" '$1 == host { print NR - 1 }')
# torchrun's store, which holds no pickles, listens on every interface of the first host: keep strangers from $PORT."""


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
        environment = worker_environment(request.config, request.workers, base) | OWN_STORE
        environment[PORT_VARIABLE] = str(free_port())
        rendezvous = private_path("rendezvous")
        argv = one_host_argv(
            sys.executable,
            request.worker_arguments,
            workers=str(request.workers),
            rendezvous=str(rendezvous),
            module=request.module,
            restarts=restarts,
            log_dir=log_dir,
        )
        return Command(
            "torchrun",
            argv,
            environment,
            restarts=restarts > 0,
            replaces_workers=restarts > 0,
            files={rendezvous: ""},
        )

    def _cluster_command(
        self, request: LaunchRequest, cluster: Cluster, log_dir: Path, base: Mapping[str, str]
    ) -> Command:
        forwarded = forwarded_env(request.config, cluster, base) | OWN_STORE
        forwarded[SECRET_VARIABLE] = secrets.token_hex(32)
        environment = launcher_environment(base, forwarded)
        first, count = cluster.hosts[0], len(cluster.hosts)
        fewest = count if request.min_hosts is None else request.min_hosts
        # An IPv6 address has to be in brackets before a port.
        meeting = f"[{first.address}]" if ":" in first.address else first.address

        def command_for(host: Host) -> tuple[str, ...]:
            argv = host_argv(
                cluster.python,
                request.worker_arguments,
                nodes=f"{fewest}:{count}",
                workers=str(len(host.devices)),
                run_id="dist-moe",
                endpoint=f"{meeting}:{cluster.settings.port}",
                is_first=str(int(host is first)),
                address=host.address,
                module=request.module,
                restarts=request.max_restarts,
                log_dir=log_dir,
            )
            if host.is_here:
                return ("env", "-C", cluster.folder, *(f"{k}={v}" for k, v in devices_of(host).items()), *argv)
            remote = (cluster.python, "-m", "dist_moe.launch.supervise.remote_exec", *argv)
            return cluster.ssh(host, remote, {"PYTHONSAFEPATH": "1"})

        restarts = request.max_restarts > 0
        return Command(
            "torchrun",
            command_for(first),
            environment,
            remote_commands=tuple(command_for(host) for host in cluster.hosts[1:]),
            sent_variables=tuple(None if host.is_here else forwarded | devices_of(host) for host in cluster.hosts),
            restarts=restarts,
            replaces_workers=restarts or fewest < count,
        )

    def files(self, request: LaunchRequest) -> Mapping[str, str]:
        """Return a script for one machine, and one to run on each of several hosts."""
        worker = ("train", shell_variable("CONFIG"), *request.overrides, ALL_ARGUMENTS)
        one = one_host_argv(PYTHON, worker, workers=shell_variable("WORKERS"), rendezvous=shell_variable("RENDEZVOUS"))
        each = static_argv(PYTHON, worker)
        return {
            "one_machine/torchrun.sh": one_machine_script(
                request,
                "torchrun",
                shell_exports(
                    worker_variables(shell_variable("THREADS")) | OWN_STORE | {PORT_VARIABLE: shell_variable("PORT")}
                ),
                shell_command(one),
                prepare=PRIVATE_FILE_SCRIPT,
            ),
            "several_hosts/torchrun.sh": several_hosts_script(
                request,
                "torchrun",
                where="on each host",
                prepare=OWN_ENTRY_SCRIPT,
                exports="",
                command=shell_command(each),
            ),
        }


def devices_of(host: Host) -> dict[str, str]:
    """Return the variable that selects the devices of a host's workers."""
    return {VISIBLE_DEVICES_VARIABLE: ",".join(map(str, host.devices))}


def one_host_argv(
    python: str,
    worker_arguments: Sequence[str],
    *,
    workers: str,
    rendezvous: str,
    module: str = "dist_moe",
    restarts: int = 0,
    log_dir: Path | None = None,
) -> tuple[str, ...]:
    """Return the command for workers that all run on this host.

    The rendezvous is a file: torchrun unpickles what it finds there, and no socket of it listens. The folder of the
    file must be open to its owner alone.
    """
    arguments = (
        *("--nnodes", "1", "--nproc-per-node", workers),
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", rendezvous),
        *("--local-addr", LOOPBACK),
        *_common_arguments(module, restarts, log_dir),
    )
    return (python, "-m", "torch.distributed.run", *arguments, *worker_arguments)


def static_argv(python: str, worker_arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the command of a script for one of several hosts, with a static rendezvous, which unpickles nothing."""
    arguments = (
        *("--nnodes", shell_variable("NODES"), "--nproc-per-node", shell_variable("SLOTS")),
        *("--node-rank", shell_variable("INDEX")),
        *("--master-addr", shell_variable("FIRST"), "--master-port", shell_variable("PORT")),
        *("--local-addr", shell_variable("HOST")),
        *_common_arguments("dist_moe", 0, None),
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
    log_dir: Path,
    module: str = "dist_moe",
    restarts: int = 0,
) -> tuple[str, ...]:
    """Return the command for the workers of one of several hosts, by `dist_moe.comm.rendezvous`.

    Args:
        python: The path of Python on that host.
        worker_arguments: The arguments of each worker.
        nodes: The number of hosts, or MIN:MAX.
        workers: The number of workers on that host.
        run_id: The name of the job, the same on all hosts.
        endpoint: HOST:PORT where the hosts meet, on the first one.
        is_first: "1" on the first host, "0" on the others.
        address: The address by which other hosts reach that host.
        log_dir: A folder for torchrun's own files.
        module: Each worker runs `python -m MODULE`.
        restarts: How often failed workers are restarted.
    """
    arguments = (
        *("--nnodes", nodes, "--nproc-per-node", workers),
        *("--rdzv-backend", BACKEND, "--rdzv-id", run_id),
        *("--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={is_first}"),
        *("--local-addr", address),
        *_common_arguments(module, restarts, log_dir),
    )
    return (python, "-m", "dist_moe.comm.rendezvous", *arguments, *worker_arguments)


def _common_arguments(module: str, restarts: int, log_dir: Path | None) -> tuple[str, ...]:
    # By default every job leaves a folder in the system's place for temporary files.
    return ("--max-restarts", str(restarts), "--log-dir", str(log_dir or os.devnull), "--module", module)


LAUNCHER = TorchrunLauncher()
