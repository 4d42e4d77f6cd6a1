"""The hosts of a job, out of its configuration, and how a command reaches one of them."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_moe.config.schema import Config
from dist_moe.config.sections.cluster import ClusterConfig
from dist_moe.launch.command import NO_SHELL, LaunchError, clean_env, has_devices, threads_per_worker
from dist_moe.launch.hostfile import filter_hosts, read_hostfile
from dist_moe.worker.contract import LAUNCH_VARIABLE
from dist_moe.worker.network import is_local_address

CONNECT_LIMIT_S = 10
# DeepSpeed's launcher carries what begins so to other hosts unasked, and lets their shells read it.
FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


@dataclass(frozen=True)
class Host:
    """One machine: its name for ssh, its devices (one worker each), and the address that its workers are reached by.

    cores: those that its workers may use; None until it has been asked.
    """

    name: str
    devices: tuple[int, ...]
    address: str
    cores: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is the machine that this process runs on."""
        return is_local_address(self.address)


@dataclass(frozen=True)
class Cluster:
    """The hosts of a job, in the order of ranks, and its `cluster` section; folder, python: on every host."""

    hosts: tuple[Host, ...]
    settings: ClusterConfig
    folder: str
    python: str

    @property
    def workers(self) -> int:
        return sum(len(host.devices) for host in self.hosts)

    def has_cores(self, threads: int) -> bool:
        """Whether every host is known to have a core for every thread of its workers."""
        return all(host.cores is not None and len(host.devices) * threads <= host.cores for host in self.hosts)

    def ssh(self, host: Host, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
        """What runs `argv` in the working folder of a host; nothing reaches its shell unquoted.

        The end of the connection does not end `argv` (`dist_moe/launch/supervise/remote_exec.py` does).
        """
        variables = [f"{name}={value}" for name, value in sorted(environment.items())]
        line = f"cd {shlex.quote(self.folder)} && exec {shlex.join(['env', *variables, *argv])}"
        return ("ssh", *self.ssh_options, host.name, line)

    @property
    def ssh_options(self) -> tuple[str, ...]:
        """Never ask, and give up on a host that does not answer."""
        port, user = self.settings.ssh_port, self.settings.ssh_user
        return (
            *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_LIMIT_S}"),
            *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
            *(("-p", str(port)) if port is not None else ()),
            *(("-l", user) if user is not None else ()),
        )


def read_cluster(settings: ClusterConfig) -> Cluster | None:
    """The cluster of a configuration; None where it names no host.

    LaunchError for a hostfile with mistakes, hosts given twice, a host whose name means no address, and the first of
    several hosts if its address is one that the others cannot use.
    """
    given = {host.name: host.address for host in settings.hosts}
    if settings.hosts and settings.hostfile:
        raise LaunchError(f"cluster.hostfile={settings.hostfile} and cluster.hosts are both set; set one of the two")
    if len(given) < len(settings.hosts):
        raise LaunchError("cluster.hosts has a name twice; give each host one entry with all its slots")
    if settings.hostfile:
        every = read_hostfile(settings.hostfile)
    else:
        every = {host.name: list(range(host.slots)) for host in settings.hosts}
    if not every:
        return None
    left = filter_hosts(every, settings.include, settings.exclude)
    hosts = [Host(name, tuple(devices), given.get(name) or _address(name)) for name, devices in left.items()]
    if len(hosts) > 1 and (hosts[0].address.startswith("127.") or hosts[0].address == "::1"):
        raise LaunchError(
            f"{hosts[0].name} has the address {hosts[0].address} here, by which the other hosts reach themselves; give "
            "the first host's own address as cluster.hosts[0].address, or mend /etc/hosts"
        )
    return Cluster(tuple(hosts), settings, settings.folder or os.getcwd(), settings.python or sys.executable)


def _address(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise LaunchError(
            f"the host {name} means no address here ({error.strerror}); mend the name, or give cluster.hosts an address"
        ) from None


def forwarded_env(config: Config, cluster: Cluster, base: Mapping[str, str]) -> dict[str, str]:
    """The variables that go along to the other hosts, where workers have these and what their ssh server sets.

    Workers of the launch's own host have its environment as well.

    base: the environment to take them from, DIST_MOE_LAUNCH (where the launch listens) among them. LaunchError where
    one that is to go along is not set here.
    """
    missing = [name for name in cluster.settings.environment if name not in base]
    if missing:
        raise LaunchError(
            f"cluster.environment names {', '.join(missing)}, not set here; set it before the launch, or leave it out"
        )
    most = max(len(host.devices) for host in cluster.hosts)
    interface = cluster.settings.interface
    return {
        "OMP_NUM_THREADS": str(threads_per_worker(config.run.threads, most)),
        "PYTHONSAFEPATH": "1",
        # Where hosts have names in one direction only, each connection would be a warning.
        "TORCH_CPP_LOG_LEVEL": base.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        **({} if has_devices() or config.parallel.backend == "nccl" else {"DS_ACCELERATOR": "cpu"}),
        **({} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}),
        **({LAUNCH_VARIABLE: base[LAUNCH_VARIABLE]} if LAUNCH_VARIABLE in base else {}),
        **{name: base[name] for name in cluster.settings.environment},
    }


def launcher_environment(base: Mapping[str, str], carried: Mapping[str, str]) -> dict[str, str]:
    """The environment of a launcher that starts workers on other hosts: `base` without what belongs to an outer job
    or would be taken along by itself, and with what is carried."""
    own = clean_env(base, FORWARDED_PREFIXES)
    return {**own, **carried, "PATH": own["PATH"]}


def require_shell_safe(told: str, texts: Sequence[str]) -> None:
    """LaunchError for a text that a shell would not leave as it is; told: who hands them to a shell."""
    for text in texts:
        if not NO_SHELL.fullmatch(text):
            raise LaunchError(
                f"{text!r} reaches a shell through {told}, which does not quote it; write it with letters, digits and "
                "@+=:,./-_ alone (values may stand in the file), or use --launcher torchrun"
            )


def require_first_devices(cluster: Cluster, told: str, alike: bool = False) -> None:
    """LaunchError where a launcher that only counts workers is asked for devices other than the first ones.

    alike: it starts the same number on each host.
    """
    for host in cluster.hosts:
        if host.devices != tuple(range(len(host.devices))):
            raise LaunchError(
                f"{told} starts workers by number, and {host.name} is to use devices {list(host.devices)}; use the "
                "first ones, or --launcher deepspeed (pdsh) or torchrun"
            )
    numbers = {host.name: len(host.devices) for host in cluster.hosts}
    if alike and len(set(numbers.values())) > 1:
        raise LaunchError(f"{told} starts as many workers on each host, not {numbers}; use another launcher")
