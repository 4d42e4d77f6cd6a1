"""The command of PyTorch's launcher, for workers on this host, and those for several."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.launch.cluster import Cluster, Host, forwarded_env, launcher_environment
from dist_moe.launch.command import Command, worker_arguments, worker_environment
from dist_moe.worker.network import LOOPBACK, free_port

FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Workers that are started again meet in a store of their own; in torchrun's they find the addresses of the dead."""


def torchrun_command(
    config: Config,
    workers: int,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    module: str = "dist_moe",
    restarts: int = 0,
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`torchrun`, which starts `workers` processes `python -m MODULE train CONFIG_PATH OVERRIDES`.

    The rendezvous is a fixed address: `--standalone` waits for ever where the host's name does not resolve.

    restarts: how often workers are started again after a failure. base: the environment to start from.
    """
    port, environment = str(free_port()), worker_environment(config, workers, base)
    rendezvous: tuple[str, ...] = ("--master-addr", LOOPBACK, "--master-port", port)
    if restarts:
        # At a fixed address all attempts share one store.
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:{port}", "--rdzv-conf", "is_host=1")
        environment |= FRESH_STORE
    arguments = [
        *("--nnodes", "1"),
        *("--nproc-per-node", str(workers)),
        *rendezvous,
        *("--local-addr", LOOPBACK),
        *("--max-restarts", str(restarts)),
        # Without it every job leaves a folder behind in the system's place for temporary files.
        *("--log-dir", str(Path(config.run.dir) / "torchrun")),
        *("--module", module),
    ]
    argv = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        *arguments,
        *worker_arguments(config_path, overrides),
    )
    return Command("torchrun", argv, environment, restarts=restarts > 0)


def torchrun_cluster_command(
    config: Config,
    cluster: Cluster,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    restarts: int = 0,
    fewest: int | None = None,
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`torchrun` on each host of `cluster`, over ssh where it is not this one; they meet at the first (c10d).

    restarts: how often workers are started again after a failure. fewest: the job begins, and goes on, with this many
    hosts at least; all of them unless told.
    """
    carried = forwarded_env(config, cluster, base) | FRESH_STORE
    environment = launcher_environment(base, carried)
    words, name = worker_arguments(config_path, overrides), f"dist-moe-{secrets.token_hex(4)}"
    first, most = cluster.hosts[0], len(cluster.hosts)

    def argv(host: Host) -> tuple[str, ...]:
        arguments = [
            *("--nnodes", f"{most if fewest is None else fewest}:{most}"),
            *("--nproc-per-node", str(len(host.devices))),
            *("--rdzv-backend", "c10d", "--rdzv-id", name),
            *("--rdzv-endpoint", f"{first.address}:{cluster.settings.port}"),
            *("--rdzv-conf", f"is_host={int(host is first)}"),
            *("--local-addr", host.address),
            *("--max-restarts", str(restarts)),
            *("--log-dir", str(Path(config.run.dir) / "torchrun")),
            *("--module", "dist_moe"),
        ]
        return (cluster.python, "-m", "torch.distributed.run", *arguments, *words)

    def reached(host: Host) -> tuple[str, ...]:
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}
        if host.is_here:
            return ("env", "-C", cluster.folder, *(f"{k}={v}" for k, v in devices.items()), *argv(host))
        leash = (cluster.python, "-m", "dist_moe.launch.supervise.remote_exec")
        return cluster.ssh(host, (*leash, *argv(host)), carried | devices)

    commands = [reached(host) for host in cluster.hosts]
    return Command("torchrun", commands[0], environment, tuple(commands[1:]), restarts > 0)
