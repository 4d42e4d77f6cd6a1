"""The hosts of a job, read from its configuration, and how a command reaches each of them."""

import logging
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_moe.config.schema import Config
from dist_moe.config.sections.cluster import ClusterConfig
from dist_moe.errors import ABSENT, Violation
from dist_moe.launch.command import SHELL_SAFE, LaunchError, clean_env, has_devices, threads_per_worker
from dist_moe.launch.hostfile import Slots, allocated_hosts, filter_hosts, read_hostfile
from dist_moe.worker.contract import LAUNCH_VARIABLE
from dist_moe.worker.network import INTERFACE_VARIABLES, is_local_address

logger = logging.getLogger(__name__)
CONNECT_LIMIT_S = 10
# DeepSpeed's launcher forwards variables with these prefixes by itself, unquoted.
FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


@dataclass(frozen=True)
class Host:
    """One machine.

    Attributes:
        name: The name by which ssh reaches it.
        devices: The numbers of its devices, one worker each.
        address: The address by which other hosts reach its workers.
        cores: The number of cores that its workers may use, or None before the preflight.
    """

    name: str
    devices: tuple[int, ...]
    address: str
    cores: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether this process runs on it."""
        return is_local_address(self.address)


@dataclass(frozen=True)
class Cluster:
    """The hosts of a job.

    Attributes:
        hosts: The hosts in the order of their ranks.
        settings: The `cluster` section of the configuration.
        folder: The working folder on every host.
        python: The path of Python on every host.
    """

    hosts: tuple[Host, ...]
    settings: ClusterConfig
    folder: str
    python: str

    @property
    def workers(self) -> int:
        """The number of workers on all hosts."""
        return sum(len(host.devices) for host in self.hosts)

    def has_cores(self, threads: int) -> bool:
        """Return whether every host is known to have a core for every thread of its workers."""
        return all(host.cores is not None and len(host.devices) * threads <= host.cores for host in self.hosts)

    def ssh(self, host: Host, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
        """Return the command that runs `argv` in the working folder of a host, with every word quoted for its shell.

        Closing the connection does not end `argv`; run it under `dist_moe/launch/supervise/remote_exec.py` for that.
        """
        variables = [f"{name}={value}" for name, value in sorted(environment.items())]
        line = f"cd {shlex.quote(self.folder)} && exec {shlex.join(['env', *variables, *argv])}"
        return ("ssh", *self.ssh_options, host.name, line)

    @property
    def ssh_options(self) -> tuple[str, ...]:
        """The options of every call of ssh."""
        return ssh_options(self.settings)


def ssh_options(settings: ClusterConfig) -> tuple[str, ...]:
    """Return options of ssh: never ask, give up on a host that does not answer, and the configured port and user."""
    port, user = settings.ssh_port, settings.ssh_user
    return (
        *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_LIMIT_S}"),
        *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
        *(("-p", str(port)) if port is not None else ()),
        *(("-l", user) if user is not None else ()),
    )


def read_cluster(settings: ClusterConfig, environment: Mapping[str, str] | None = None) -> Cluster | None:
    """Return the cluster of a configuration, or None if there is no host but this one.

    Without hosts in the configuration they are those of the job of PBS or LSF in which this process runs, if these are
    several.

    Args:
        settings: The `cluster` section of the configuration.
        environment: The variables in which a batch system names the hosts of its job; None for none.

    Raises:
        LaunchError: The hostfile is invalid, a host is listed twice, a host's name does not resolve, or the first of
            several hosts has a loopback address.
    """
    addresses = {host.name: host.address for host in settings.hosts}
    selected = _selected(settings, environment or {})
    if selected is None:
        return None
    hosts = [Host(name, tuple(devices), addresses.get(name) or _address(name)) for name, devices in selected.items()]
    if len(hosts) > 1 and (hosts[0].address.startswith("127.") or hosts[0].address == "::1"):
        raise LaunchError(
            f"{hosts[0].name} resolves to the loopback address {hosts[0].address}, which other hosts cannot reach; set "
            "cluster.hosts[0].address to the first host's own address, or fix /etc/hosts"
        )
    return Cluster(tuple(hosts), settings, settings.folder or os.getcwd(), settings.python or sys.executable)


def cluster_violations(settings: ClusterConfig) -> list[Violation]:
    """Return what is wrong with the hosts that a configuration names. Reads its hostfile, and resolves no name."""
    try:
        _selected(settings, {})
    except LaunchError as error:
        statement, _, remedy = str(error).rpartition("; ")
        subject, _, rule = statement.partition(" ")
        return [Violation(subject, ABSENT, rule, remedy)]
    return []


def _selected(settings: ClusterConfig, environment: Mapping[str, str]) -> Slots | None:
    """Return the hosts and devices that a configuration selects; None if there is no host but this one."""
    if settings.hosts and settings.hostfile:
        raise LaunchError(f"cluster.hostfile={settings.hostfile} and cluster.hosts are both set; set one of the two")
    if len({host.name for host in settings.hosts}) < len(settings.hosts):
        raise LaunchError("cluster.hosts lists a name twice; give each host one entry with all its slots")
    if settings.hostfile:
        listed = read_hostfile(settings.hostfile)
    elif settings.hosts:
        listed = {host.name: list(range(host.slots)) for host in settings.hosts}
    else:
        source, listed = allocated_hosts(environment)
        if len(listed) < 2:
            return None
        shown = ", ".join(f"{name} slots={len(devices)}" for name, devices in listed.items())
        logger.warning("the hosts are those of %s: %s (set cluster.hosts for others)", source, shown)
    return filter_hosts(listed, settings.include, settings.exclude)


def _address(name: str) -> str:
    if "%" in name:
        raise LaunchError(
            f"{name} is an address of one link ({name.partition('%')[2]} is an interface of this host), by which other "
            "hosts cannot reach it; use its global address, or set `address` in its entry of cluster.hosts"
        )
    try:
        found = socket.getaddrinfo(name, None, socket.AF_UNSPEC, socket.SOCK_STREAM)
        # IPv4 where the host has both.
        return str(sorted(found, key=lambda entry: entry[0] != socket.AF_INET)[0][4][0])
    except OSError as error:
        raise LaunchError(
            f"the name of the host {name} does not resolve ({error.strerror}); fix the name, or set its address in "
            "cluster.hosts"
        ) from None


def forwarded_env(config: Config, cluster: Cluster, base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set for workers on other hosts, besides those of their ssh server.

    Workers on the host of the launch inherit its environment too.

    Args:
        config: The configuration of the run.
        cluster: The hosts.
        base: The environment to read them from, with DIST_MOE_LAUNCH (where the launch listens).

    Raises:
        LaunchError: `cluster.environment` names a variable that is not set in `base`.
    """
    missing = [name for name in cluster.settings.environment if name not in base]
    if missing:
        raise LaunchError(
            f"cluster.environment names {', '.join(missing)}, which is not set; set it before the launch, or remove it"
        )
    max_workers = max(len(host.devices) for host in cluster.hosts)
    interface = cluster.settings.interface
    return {
        "OMP_NUM_THREADS": str(threads_per_worker(config.run.threads, max_workers)),
        "PYTHONSAFEPATH": "1",
        # Where the hosts' addresses have no names, torch would warn of every connection.
        "TORCH_CPP_LOG_LEVEL": base.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        **({} if has_devices() or config.parallel.backend == "nccl" else {"DS_ACCELERATOR": "cpu"}),
        **({} if interface is None else dict.fromkeys(INTERFACE_VARIABLES, interface)),
        **({LAUNCH_VARIABLE: base[LAUNCH_VARIABLE]} if LAUNCH_VARIABLE in base else {}),
        **{name: base[name] for name in cluster.settings.environment},
    }


def launcher_environment(base: Mapping[str, str], forwarded: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a launcher that starts workers on other hosts.

    It is `base` without the variables of an outer job and those that DeepSpeed forwards by itself, with `forwarded`.
    """
    own = clean_env(base, FORWARDED_PREFIXES)
    return {**own, **forwarded, "PATH": own["PATH"]}


def require_shell_safe(where: str, texts: Sequence[str]) -> None:
    """Check texts that are passed to a shell unquoted.

    Args:
        where: What passes them, for the message.
        texts: The texts.

    Raises:
        LaunchError: A shell would change a text.
    """
    for text in texts:
        if not SHELL_SAFE.fullmatch(text):
            raise LaunchError(
                f"{text!r} reaches a shell through {where}, which does not quote it; use only letters, digits and "
                "@+=:,./-_ (or move the value to the configuration file), or use --launcher torchrun"
            )


def require_ipv4(cluster: Cluster, what: str) -> None:
    """Check the hosts of a launcher whose notation of hosts has no IPv6 addresses.

    Args:
        cluster: The hosts.
        what: The option that selects the launcher, for the message.

    Raises:
        LaunchError: A host is named by its IPv6 address.
    """
    for host in cluster.hosts:
        if ":" in host.name:
            raise LaunchError(
                f"{what} takes no IPv6 address, and a host is {host.name}; give it a name (in /etc/hosts or "
                "~/.ssh/config) and set `address` in its entry of cluster.hosts, or use --launcher torchrun"
            )


def require_first_devices(cluster: Cluster, what: str, same_count: bool = False) -> None:
    """Check the devices of a launcher that can only be given a number of workers.

    Args:
        cluster: The hosts.
        what: The option that selects the launcher, for the message.
        same_count: Whether it starts the same number of workers on each host.

    Raises:
        LaunchError: A host is to use devices other than its first ones, or the numbers differ.
    """
    for host in cluster.hosts:
        if host.devices != tuple(range(len(host.devices))):
            raise LaunchError(
                f"{what} starts workers by number, and {host.name} is to use devices {list(host.devices)}; use the "
                "first ones, or --launcher deepspeed (pdsh) or torchrun"
            )
    numbers = {host.name: len(host.devices) for host in cluster.hosts}
    if same_count and len(set(numbers.values())) > 1:
        raise LaunchError(f"{what} starts the same number of workers on each host, not {numbers}; use another launcher")
